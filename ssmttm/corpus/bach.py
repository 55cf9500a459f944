"""The source `bach`: the scores of J. S. Bach in music21's corpus, rendered with a SoundFont.

Four hours of real music that come with two PyPI packages, for studies that must run anywhere. Scores are listed by
their files, without importing music21. Three kinds of file are not used: Roman-numeral analyses, which are not scores;
Humdrum files, whose encoder reserves the rights to derived electronic formats; and a score that repeats another note
for note (found once it has been read, see stages.py). Repeats are not played twice, so that no clip copies another.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from ssmttm.corpus.bach_captions import bach_captions
from ssmttm.corpus.manifest import SetAside, Skipped
from ssmttm.corpus.packages import installed_folder, installed_version
from ssmttm.corpus.render import Note, Part, orchestrate, program_for, render
from ssmttm.corpus.soundfont import soundfont
from ssmttm.corpus.source import OpenTrack, SkipTrackError, TrackFacts, TrackRef
from ssmttm.corpus.spec import BuildSpec
from ssmttm.files import sha256_file

SOUNDFONT_LICENCE = "SoundFont TimGM6mb: GPL-2.0"
_MUSIC21 = "music21 corpus: used with the encoder's permission, commercial use may be restricted"
_GREENTREE = "encoding (c) Margaret Greentree, used by permission"
_SEMITONES = range(-5, 7)


@dataclass(frozen=True)
class BachSource:
    """music21's Bach scores under one specification."""

    spec: BuildSpec
    name: str = "bach"

    def tracks(self) -> tuple[list[TrackRef], list[Skipped]]:
        """Return a track for each version of each score; raises InputError if music21 is not installed."""
        folder = installed_folder("music21") / "corpus" / "bach"
        refs: list[TrackRef] = []
        skipped: list[Skipped] = []
        for path in sorted(folder.iterdir()):
            if path.suffix == ".krn":
                reason = "its encoder (CCARH) reserves the rights to derived electronic formats"
                skipped.append(Skipped(track=f"bach/{path.stem}", reason=reason))
            if path.suffix not in (".mxl", ".xml"):
                continue
            for version in range(self.spec.versions):
                suffix = f"#{version}" if self.spec.versions > 1 else ""
                refs.append(
                    TrackRef(
                        track=f"bach/{path.stem}{suffix}",
                        piece=f"bach/{path.stem}",
                        group=path.stem.split("-")[0],  # bwv18.5-lz and bwv18.5-w are one piece
                        path=path,
                    )
                )
        return refs, skipped

    def set_aside(self) -> tuple[SetAside, ...]:
        """Return nothing: captions are made of the scores."""
        return ()

    def identity(self) -> dict[str, JsonValue]:
        """Return nothing: the specification identifies the music, which comes with the packages."""
        return {}

    def made_with(self) -> dict[str, JsonValue]:
        """Return the versions of music21 and symusic, and the SoundFont's hash."""
        return {
            "music21": installed_version("music21"),
            "symusic": installed_version("symusic"),
            "soundfont": sha256_file(soundfont()),
        }

    def open(self, ref: TrackRef) -> OpenTrack:
        """Read, vary and render one score; raises SkipTrackError if music21 cannot read it."""
        score = _parsed(ref.path)
        parts = _parts(score)
        if not any(part.notes for part in parts):
            raise SkipTrackError("no notes in the score")
        draw = hashlib.sha256(f"{self.spec.seed}:variety:{ref.track}".encode()).digest()
        shift = _SEMITONES[draw[0] % len(_SEMITONES)] if self.spec.transpose else 0
        ensemble, parts = orchestrate(parts, draw[1]) if self.spec.orchestrate else ("", parts)
        tempos = _tempos(score) or [(0.0, self.spec.tempo_bpm)]
        audio = render(parts, tempos, shift, self.spec.sample_rate)
        tonic, mode = _key(score)
        title = _title(ref.path.stem)
        captions = bach_captions(
            start=draw[2],
            title=title,
            kind="chorale" if any("soprano" in part.name for part in parts) else "piece",
            tonic=(tonic + shift) % 12,
            mode=mode,
            metre=_metre(score),
            tempo_bpm=tempos[0][1],
            instruments=[ensemble] if ensemble else [part.name for part in parts],
            seconds=len(audio) / self.spec.sample_rate,
        )
        boxes = score.getElementsByClass("TextBox")
        encoder = f"; {_GREENTREE}" if any("Greentree" in (box.content or "") for box in boxes) else ""
        facts = TrackFacts(
            title=title,
            licence=f"{_MUSIC21}{encoder}; {SOUNDFONT_LICENCE}",
            captions=captions,
            placed=True,
            content=_content(parts),
        )
        return OpenTrack(facts, iter([audio]))


@lru_cache(maxsize=1)  # the versions of a score come one after another
def _parsed(path: Path) -> Any:
    from music21 import converter
    from music21.exceptions21 import Music21Exception

    try:
        # Do not use music21's cache of pickles in the home folder.
        return converter.parse(path, forceSource=True, storePickle=False)
    except (Music21Exception, ValueError, KeyError) as error:
        raise SkipTrackError(f"music21 cannot read it: {error}") from error


def _parts(score: Any) -> list[Part]:
    parts = []
    for number, part in enumerate(score.parts):
        name = " ".join((part.partName or f"Part {number + 1}").split())
        parts.append(Part(name=name.lower(), program=program_for(name), notes=tuple(_notes(part))))
    return parts


def _notes(part: Any) -> list[Note]:
    """Return notes in quarter lengths, tied ones joined, without grace notes and unpitched ones."""
    sounding: list[tuple[float, int, float, str]] = []
    for element in part.flatten().notes:
        for member in element.notes if element.isChord else [element]:
            if hasattr(member, "pitch") and element.quarterLength > 0:
                tie = member.tie.type if member.tie is not None else ""
                pitch = int(member.pitch.midi)
                sounding.append((float(element.offset), pitch, float(element.quarterLength), tie))
    held: dict[int, int] = {}  # MIDI pitch -> index of the note that a tie continues
    notes: list[Note] = []
    # Sorted, since the order in which music21 gives simultaneous notes of two voices varies, and the last bits of a
    # rendering depend on it.
    for start, pitch, length, tie in sorted(sounding):
        if tie in ("continue", "stop") and pitch in held:
            place = held[pitch]
            before = notes[place]
            notes[place] = Note(before.start, start + length - before.start, pitch)
        else:
            place = len(notes)
            notes.append(Note(start, length, pitch))
        if tie in ("start", "continue"):
            held[pitch] = place
        else:
            held.pop(pitch, None)
    return notes


def _tempos(score: Any) -> list[tuple[float, float]]:
    """Return (quarter length, quarters a minute) of the score's own marks, if one stands at the start."""
    found: dict[float, float] = {}
    for mark in score.parts[0].flatten().getElementsByClass("MetronomeMark"):
        bpm = mark.getQuarterBPM()
        if bpm:
            found[float(mark.offset)] = float(bpm)
    if found and min(found) > 0:
        return []
    return sorted(found.items())


def _key(score: Any) -> tuple[int, str]:
    """Return (pitch class, mode) as encoded, or by Krumhansl's profiles if the mode is not encoded."""
    for signature in score.parts[0].flatten().getElementsByClass("KeySignature"):
        mode = getattr(signature, "mode", None)
        if mode in ("major", "minor"):
            return int(signature.asKey(mode).tonic.pitchClass), mode
        break
    key = score.analyze("key")
    return int(key.tonic.pitchClass), str(key.mode)


def _metre(score: Any) -> str:
    signatures = score.parts[0].flatten().getElementsByClass("TimeSignature")
    return next((str(signature.ratioString) for signature in signatures), "")


def _title(stem: str) -> str:
    """Return the chorale's name by music21's list of Riemenschneider's numbers, and its BWV."""
    number = stem.removeprefix("bwv").split("-")[0]
    name = _chorales().get(number)
    return f"{name}, BWV {number}" if name else f"BWV {number}"


@lru_cache(maxsize=1)
def _chorales() -> dict[str, str]:
    from music21.corpus.chorales import ChoraleListRKBWV

    return {bwv: str(entry["title"]) for bwv, entry in ChoraleListRKBWV().byBWV.items()}


def _content(parts: list[Part]) -> str:
    """Return a hash that scores share if the same harmonies sound in them, transposed or not.

    The hash covers the notes that sound on each half of a quarter note: ties and repeated notes make no difference.
    """
    notes = [note for part in parts for note in part.notes]
    first, low = min(note.start for note in notes), min(note.pitch for note in notes)
    sounding: set[tuple[int, int]] = set()
    for note in notes:
        start, end = note.start - first, note.start - first + note.length
        sounding.update((half, note.pitch - low) for half in range(ceil(2 * start), ceil(2 * end)))
    return hashlib.sha256(repr(sorted(sounding)).encode()).hexdigest()
