"""Render notes as audio: instruments for parts, and symusic's synthesiser with pretty_midi's SoundFont."""

import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ssmttm.corpus.soundfont import repaired_soundfont, soundfont
from ssmttm.corpus.source import Array

Tempos = Sequence[tuple[float, float]]
"""(Quarter note, quarters a minute)."""

_TICKS = 480  # a quarter note
_QUALITY = 4  # sinc interpolation; 1000 times real time on one core
_PEAK = 0.9
_VELOCITY = 80

# General MIDI programs by a word of the part's name; the first match counts. Voices stand first, since some scores
# name the instruments that double a voice after it.
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


class Part(NamedTuple):
    """One part of a score and the General MIDI program that plays it."""

    name: str
    program: int
    notes: tuple[Note, ...]


def program_for(name: str) -> int:
    """Return the General MIDI program for a part of this name."""
    lowered = name.lower()
    return next((program for word, program in _PROGRAMS if word in lowered), _HARPSICHORD)


def orchestrate(parts: Sequence[Part], draw: int) -> tuple[str, list[Part]]:
    """Give the parts to one of the ensembles; return its name and the parts."""
    name, programs = _ENSEMBLES[draw % len(_ENSEMBLES)]
    return name, [
        part._replace(program=programs[place * len(programs) // len(parts)])
        for place, part in enumerate(parts)
    ]


def render(parts: Sequence[Part], tempos: Tempos, semitones: int, sample_rate: int) -> Array:
    """Return mono audio (samples,) of parts moved by some semitones, with its peak at 0.9."""
    # Parts are rendered singly and mixed in their order, so that neither threads nor earlier renderings change a bit.
    played = [_render_part(part, tempos, semitones, sample_rate) for part in parts if part.notes]
    audio: Array = np.zeros(max((len(part) for part in played), default=0), np.float32)
    for part in played:
        audio[: len(part)] += part
    peak = float(np.abs(audio).max(initial=0.0))
    if peak:
        audio *= np.float32(_PEAK / peak)
    return audio


def _render_part(part: Part, tempos: Tempos, semitones: int, sample_rate: int) -> Array:
    import symusic

    score = symusic.Score(_TICKS)
    for start, bpm in tempos:
        score.tempos.append(symusic.Tempo(round(start * _TICKS), bpm))
    track = symusic.Track(program=part.program)
    for note in part.notes:
        first, last = round(note.start * _TICKS), round((note.start + note.length) * _TICKS)
        pitch = min(127, max(0, note.pitch + semitones))
        track.notes.append(symusic.Note(first, max(1, last - first), pitch, _VELOCITY))
    score.tracks.append(track)
    rendered = _synthesiser(sample_rate, part.program).render(score, stereo=False)
    mono: Array = np.asarray(rendered, dtype=np.float32)[0]
    return mono


@lru_cache(maxsize=4)  # 20 MB each
def _synthesiser(sample_rate: int, program: int) -> Any:  # noqa: ARG001
    # One for each program: symusic caches prepared samples, and if two programs share a sample (violin and viola do),
    # the first would decide the loudness of the other.
    import symusic

    # symusic takes a path and reads it at once.
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "repaired.sf2"
        file.write_bytes(repaired_soundfont(soundfont()))
        return symusic.Synthesizer(str(file), sample_rate, _QUALITY)
