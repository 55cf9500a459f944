"""Captions of a score from its metadata: title, key, metre, tempo, instruments, length."""

import re
from collections import Counter
from collections.abc import Sequence

from ssmttm.corpus.tag_captions import listed

_KEYBOARDS = ("piano", "organ", "continuo", "harpsichord")
_MAJOR = ("C", "D-flat", "D", "E-flat", "E", "F", "F-sharp", "G", "A-flat", "A", "B-flat", "B")
_MINOR = ("C", "C-sharp", "D", "E-flat", "E", "F", "F-sharp", "G", "G-sharp", "A", "B-flat", "B")

# `{part}` is later replaced by a phrase of `place_phrase`.
_SENTENCES = (
    "{{part}} {title} by Johann Sebastian Bach, in {key}, {metre}, at {tempo} beats per minute, for {players}; "
    "{length}.",
    "A {kind} in {key} for {players}: {{part}} {title}. {metre}, {tempo} bpm, {length}.",
    "{pace} music by Bach in {metre} and {key}, {{part}} {title}, for {players}, {tempo} beats per minute, {length}.",
    "J. S. Bach, {title}: {{part}} a {pace} {kind} in {key} for {players}. {length}, {tempo} bpm, {metre}.",
    "{players}, {{part}} Bach's {title}, {pace}, {tempo} bpm, {key}, {metre}, {length}.",
)


def bach_captions(
    start: int,
    *,
    title: str,
    kind: str,
    tonic: int,
    mode: str,
    metre: str,
    tempo_bpm: float,
    instruments: Sequence[str],
    seconds: float,
) -> tuple[str, ...]:
    """Return every caption of a piece, rotated by `start` so that pieces begin with different ones.

    kind: chorale or piece. tonic: pitch class, C = 0. metre: such as 4/4; empty if the score gives none.
    """
    values = {
        "title": title,
        "key": _key_name(tonic, mode),
        "metre": f"{metre} time" if metre else "free time",
        "tempo": f"{tempo_bpm:.0f}",
        "players": _players(instruments),
        "length": _length(seconds),
        "pace": "slow" if tempo_bpm < 76 else "moderate" if tempo_bpm < 112 else "lively",
        "kind": kind,
    }
    filled = [sentence.format(**values) for sentence in _SENTENCES]
    captions = [caption[:1].upper() + caption[1:] for caption in filled]
    turn = start % len(captions)
    return tuple(captions[turn:] + captions[:turn])


def place_phrase(clip: int, clips: int) -> str:
    """Return the phrase for the place of clip number `clip` of a track's `clips`."""
    if clips == 1:
        return "the whole of"
    if clip == 0:
        return "the opening of"
    return "the close of" if clip == clips - 1 else "a passage from"


def _key_name(tonic: int, mode: str) -> str:
    return f"{(_MINOR if mode == 'minor' else _MAJOR)[tonic % 12]} {mode}"


def _length(seconds: float) -> str:
    """Return a length in words, such as `1 minute 20 seconds long`."""
    minutes, rest = divmod(round(seconds), 60)
    parts = [f"{n} {word}{'s' if n > 1 else ''}" for n, word in ((minutes, "minute"), (rest, "second")) if n]
    return f"{' '.join(parts) or '0 seconds'} long"


def _players(names: Sequence[str]) -> str:
    """Return `a, b and c` without desk numbers: violin 1 and violin 2 are violins, a piano's two staves one piano."""
    counts: Counter[str] = Counter()
    for name in names:
        counts[re.sub(r"[\s\d,]+$", "", name)] += 2 if name.endswith(("1,2", "s")) else 1
    return listed([
        f"{word}s" if n > 1 and not word.endswith("s") and word not in _KEYBOARDS else word
        for word, n in counts.items()
    ])  # fmt: skip
