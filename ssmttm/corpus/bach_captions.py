"""Sentences about a score, made of its own metadata: title, key, metre, tempo, instruments, length."""

import re
from dataclasses import dataclass

_KEYBOARDS = ("piano", "organ", "continuo", "harpsichord")
_MAJOR = ("C", "D-flat", "D", "E-flat", "E", "F", "F-sharp", "G", "A-flat", "A", "B-flat", "B")
_MINOR = ("C", "C-sharp", "D", "E-flat", "E", "F", "F-sharp", "G", "G-sharp", "A", "B-flat", "B")

# `{part}` is left for the clip's place: "the opening of", "a passage from", "the close of", "the whole of".
_SENTENCES = (
    "{{part}} {title} by Johann Sebastian Bach, in {key}, {metre}, at {tempo} beats per minute, for {players}; "
    "{length}.",
    "A {kind} in {key} for {players}: {{part}} {title}. {metre}, {tempo} bpm, {length}.",
    "{pace} music by Bach in {metre} and {key}, {{part}} {title}, for {players}, {tempo} beats per minute, {length}.",
    "J. S. Bach, {title}: {{part}} a {pace} {kind} in {key} for {players}. {length}, {tempo} bpm, {metre}.",
    "{players}, {{part}} Bach's {title}, {pace}, {tempo} bpm, {key}, {metre}, {length}.",
)


@dataclass(frozen=True)
class Piece:
    """What a score says of itself."""

    title: str
    kind: str
    """A chorale or a piece."""
    tonic: int
    """Pitch class, C = 0."""
    mode: str
    metre: str
    """Such as 4/4; empty where the score gives none."""
    tempo_bpm: float
    instruments: tuple[str, ...]
    seconds: float


def bach_captions(piece: Piece, start: int) -> tuple[str, ...]:
    """Every way to describe a piece, the list turned so that pieces begin at different ones."""
    pace = "slow" if piece.tempo_bpm < 76 else "moderate" if piece.tempo_bpm < 112 else "lively"
    values = {
        "title": piece.title,
        "key": key_name(piece.tonic, piece.mode),
        "metre": f"{piece.metre} time" if piece.metre else "free time",
        "tempo": f"{piece.tempo_bpm:.0f}",
        "players": joined(piece.instruments),
        "length": spoken_length(piece.seconds),
        "pace": pace,
        "kind": piece.kind,
    }
    made = [_capital(sentence.format(**values)) for sentence in _SENTENCES]
    turn = start % len(made)
    return tuple(made[turn:] + made[:turn])


def place_phrase(clip: int, clips: int) -> str:
    """Where clip number `clip` of a track's `clips` lies."""
    if clips == 1:
        return "the whole of"
    if clip == 0:
        return "the opening of"
    return "the close of" if clip == clips - 1 else "a passage from"


def key_name(tonic: int, mode: str) -> str:
    """Such as `F-sharp minor`."""
    return f"{(_MINOR if mode == 'minor' else _MAJOR)[tonic % 12]} {mode}"


def spoken_length(seconds: float) -> str:
    """Such as `1 minute 20 seconds long`."""
    minutes, rest = divmod(round(seconds), 60)
    said = [f"{n} {word}{'s' if n > 1 else ''}" for n, word in ((minutes, "minute"), (rest, "second")) if n]
    return f"{' '.join(said) or '0 seconds'} long"


def joined(names: tuple[str, ...]) -> str:
    """`a, b and c`, the numbers of desks dropped: violin 1 and violin 2 are violins, a piano's two staves one."""
    plain: dict[str, int] = {}
    for name in names:
        word = re.sub(r"[\s\d,]+$", "", name)
        plain[word] = plain.get(word, 0) + (2 if name.endswith(("1,2", "s")) else 1)
    words = [
        f"{word}s" if n > 1 and not word.endswith("s") and word not in _KEYBOARDS else word
        for word, n in plain.items()
    ]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]
