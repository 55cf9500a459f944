"""Notes to audio: who plays a part, and symusic's synthesiser with the SoundFont that pretty_midi carries."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ssmttm.corpus.soundfont import repaired_soundfont, soundfont
from ssmttm.corpus.source import Array

_TICKS = 480  # a quarter note
_QUALITY = 4  # sinc interpolation; 1000 times real time on one core
_PEAK = 0.9
_VELOCITY = 80

# General MIDI programs by a word of the part's name; the first that fits counts. Voices come first, since some
# scores name the instruments that double a voice after it.
_PROGRAMS = (
    ("bassoon", 70),
    ("soprano", 52),
    ("alto", 52),
    ("tenor", 52),
    ("bass", 52),
    ("violin", 40),
    ("viola", 41),
    ("caccia", 69),
    ("oboe", 68),
    ("recorder", 74),
    ("flute", 73),
    ("horn", 60),
    ("trumpet", 56),
    ("cornet", 56),
    ("timpani", 47),
    ("organ", 19),
    ("continuo", 19),
    ("piano", 0),
)
_HARPSICHORD = 6

# Each ensemble's programs from the highest part to the lowest.
_ENSEMBLES = (
    ("a choir", (52,)),
    ("a church organ", (19,)),
    ("a piano", (0,)),
    ("a harpsichord", (6,)),
    ("a string orchestra", (48,)),
    ("a string quartet", (40, 40, 41, 42)),
    ("a brass ensemble", (56, 60, 57, 58)),
    ("a woodwind quartet", (73, 68, 71, 70)),
    ("guitars", (24,)),
    ("a marimba", (12,)),
)


class Note(NamedTuple):
    """One note: start and length in quarter notes, pitch as a MIDI number."""

    start: float
    length: float
    pitch: int


@dataclass(frozen=True)
class Part:
    """One part of a score and the General MIDI program that plays it."""

    name: str
    program: int
    notes: tuple[Note, ...]


@dataclass(frozen=True)
class Performance:
    """What is played: parts, (quarter note, quarters a minute) tempos, and a transposition."""

    parts: tuple[Part, ...]
    tempos: tuple[tuple[float, float], ...]
    semitones: int = 0


def program_for(name: str) -> int:
    """The General MIDI program for a part of this name."""
    lowered = name.lower()
    return next((program for word, program in _PROGRAMS if word in lowered), _HARPSICHORD)


def orchestrate(parts: Sequence[Part], draw: int) -> tuple[str, list[Part]]:
    """Give the parts to one of the ensembles: (its name, the parts)."""
    name, programs = _ENSEMBLES[draw % len(_ENSEMBLES)]
    seats = [place * len(programs) // len(parts) for place in range(len(parts))]
    return name, [replace(part, program=programs[seat]) for part, seat in zip(parts, seats, strict=True)]


def render(performance: Performance, sample_rate: int) -> Array:
    """Mono audio (samples,) of a performance, its peak at 0.9."""
    # The parts are rendered singly and mixed here in their order, so that neither threads nor what was played before
    # can change a bit.
    played = [_render_part(part, performance, sample_rate) for part in performance.parts if part.notes]
    audio: Array = np.zeros(max((len(part) for part in played), default=0), np.float32)
    for part in played:
        audio[: len(part)] += part
    peak = float(np.abs(audio).max(initial=0.0))
    if peak:
        audio *= np.float32(_PEAK / peak)
    return audio


def _render_part(part: Part, performance: Performance, sample_rate: int) -> Array:
    import symusic

    score = symusic.Score(_TICKS)
    for start, bpm in performance.tempos:
        score.tempos.append(symusic.Tempo(round(start * _TICKS), bpm))
    track = symusic.Track(program=part.program)
    for note in part.notes:
        first, last = round(note.start * _TICKS), round((note.start + note.length) * _TICKS)
        pitch = min(127, max(0, note.pitch + performance.semitones))
        track.notes.append(symusic.Note(first, max(1, last - first), pitch, _VELOCITY))
    score.tracks.append(track)
    rendered = _synthesiser(sample_rate, part.program).render(score, stereo=False)
    mono: Array = np.asarray(rendered, dtype=np.float32)[0]
    return mono


@lru_cache(maxsize=4)  # 20 MB each
def _synthesiser(sample_rate: int, program: int) -> Any:  # noqa: ARG001
    # One a program: symusic keeps what it has prepared of a sample, and where two programs share one (violin and
    # viola do), the first to come would decide how loud the other plays.
    import symusic

    # symusic takes a path and reads it at once.
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "repaired.sf2"
        file.write_bytes(repaired_soundfont(soundfont()))
        return symusic.Synthesizer(str(file), sample_rate, _QUALITY)
