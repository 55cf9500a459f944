"""Choose the captions to generate music for, and the reference to compare it with.

By default both are the corpus's held-out clips: their captions, and their decoded tokens, so that the codec's losses
are on both sides. A file of prompts replaces the captions, a folder of recordings the reference. Both are paired if
prompt i describes reference clip i.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np

from ssmttm.codec.base import Audio, Codec
from ssmttm.corpus.audio import SUFFIXES, stream_audio
from ssmttm.corpus.caption_files import read_captions
from ssmttm.corpus.dataset import TokenDataset
from ssmttm.corpus.source import SkipTrackError
from ssmttm.errors import InputError
from ssmttm.files import sha256_file

RECORDING_RATE = 48000
"""Sample rate of recordings in Hz: the highest of all measures, so that none loses high frequencies."""


class Reference(Protocol):
    """Clips to compare generated ones with."""

    @property
    def what(self) -> str:
        """Name of the kind of clips."""

    @property
    def digest(self) -> str:
        """SHA-256 over the content."""

    def __len__(self) -> int: ...

    def clips(self, items: Sequence[int], codec: Codec) -> tuple[list[Audio], int]:
        """Return mono clips, each (samples,), and their sample rate."""


@dataclass(frozen=True)
class HeldOutClips:
    """The first clips of a corpus's held-out split, decoded from their own tokens."""

    data: TokenDataset
    count: int
    frames: int
    """Largest number of frames of a clip; its padding is cut off."""
    what: str = "codec-decoded held-out clips"

    @property
    def digest(self) -> str:
        """SHA-256 over the corpus's fingerprint, which covers its codec, and the sizes."""
        return _sha256(self.what, "without padding", self.data.manifest.fingerprint, self.count, self.frames)

    def __len__(self) -> int:
        return self.count

    def clips(self, items: Sequence[int], codec: Codec) -> tuple[list[Audio], int]:
        """Return the clips, and the codec's sample rate."""
        facts = self.data.manifest.codec
        lengths = np.minimum(self.data.lengths(items), self.frames)
        codes = self.data.codes(items).astype(np.uint16)
        clips: dict[int, Audio] = {}
        # Decoded padding is audible and changes the frames before it: only clips of one length are decoded together.
        for length in np.unique(lengths):
            rows = np.flatnonzero(lengths == length)
            samples = math.ceil(length * facts.sample_rate / facts.frame_rate)
            decoded = codec.decode(codes[rows, :, :length])
            clips |= {int(row): clip[:samples] for row, clip in zip(rows, decoded, strict=True)}
        return [clips[row] for row in range(len(items))], facts.sample_rate


@dataclass(frozen=True)
class Recordings:
    """Sound files, mono, from their beginning."""

    paths: Sequence[Path]
    seconds: float
    """Largest length of a clip in seconds."""
    digest: str
    what: str = "recordings"

    def __len__(self) -> int:
        return len(self.paths)

    def clips(self, items: Sequence[int], codec: Codec) -> tuple[list[Audio], int]:  # noqa: ARG002  # not decoded
        """Return the clips at 48 kHz; raises InputError that names a file that cannot be read."""
        return [self._clip(self.paths[item]) for item in items], RECORDING_RATE

    def _clip(self, path: Path) -> Audio:
        wanted = round(self.seconds * RECORDING_RATE)
        try:
            blocks = list(stream_audio(path, RECORDING_RATE, self.seconds))
        except SkipTrackError as error:
            raise InputError(f"{path}: {error}; remove it from the reference") from None
        clip = np.concatenate(blocks)[:wanted] if blocks else np.zeros(0, np.float32)
        if not len(clip):
            raise InputError(f"{path}: holds no audio; remove it from the reference")
        return clip


@dataclass(frozen=True)
class PromptSet:
    """Captions, and the reference for the audio generated from them."""

    captions: tuple[str, ...]
    reference: Reference
    paired: bool
    """True if caption i describes reference clip i."""
    left_out: int = 0
    """Number of prompts whose recording is missing."""

    @property
    def digest(self) -> str:
        """SHA-256 over the captions in their order."""
        return _sha256(*self.captions)


def choose_prompts(
    data: TokenDataset, frames: int, prompts: Path | None, reference: Path | None, limit: int | None
) -> PromptSet:
    """Return at most `limit` captions, of a file or else of the held-out split `data`, and their reference.

    prompts: a caption file such as MusicCaps' CSV, whose rows may name a recording (path, audio, ytid). reference: a
    folder of recordings. Prompts that name a recording are paired with it, and the other prompts left out; if no prompt
    names one, the whole folder is the reference of all. frames: those of a generated clip, the limit of a reference
    clip. Raises InputError if a file is wrong, or if no prompt is left.
    """
    seconds = frames / data.manifest.codec.frame_rate
    if prompts is None:
        count = min(len(data), limit or len(data))
        rows = [(caption, "") for caption in data.captions(range(count))]
    else:
        rows = [(row.caption, row.name) for row in islice(read_captions(prompts, named=False), limit)]
        if not rows:
            raise InputError(f"{prompts}: holds no prompts")
    captions = tuple(caption for caption, _ in rows)
    if reference is None:
        held = HeldOutClips(data, min(len(data), limit or len(data)), frames)
        return PromptSet(captions, held, paired=prompts is None)
    files = _sound_files(reference)
    if not any(name for _, name in rows):
        return PromptSet(captions, _recordings(list(files.values()), seconds), paired=False)
    stems: dict[str, list[str]] = {}
    for name in files:
        stems.setdefault(Path(name).stem, []).append(name)
    found = [(caption, _recording(name, files, stems)) for caption, name in rows]
    there = [(caption, path) for caption, path in found if path is not None]
    if not there:
        raise InputError(f"{reference}: holds none of the recordings {prompts} names, such as {rows[0][1]!r}")
    return PromptSet(
        tuple(caption for caption, _ in there),
        _recordings([path for _, path in there], seconds),
        paired=True,
        left_out=len(rows) - len(there),
    )


def _recordings(paths: Sequence[Path], seconds: float) -> Recordings:
    return Recordings(paths, seconds, _sha256("recordings", seconds, *(sha256_file(path) for path in paths)))


def _sound_files(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise InputError(f"--reference {folder}: no such folder")
    found = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in SUFFIXES and path.is_file()
    }
    if not found:
        raise InputError(f"--reference {folder}: holds no sound file ({', '.join(SUFFIXES)})")
    return found


def _recording(name: str, files: Mapping[str, Path], stems: Mapping[str, Sequence[str]]) -> Path | None:
    """Return the file of that path, else the only one of that name; raises InputError if several have it."""
    if name in files:
        return files[name]
    path = Path(name)
    stem = path.stem if path.suffix.lower() in SUFFIXES else path.name
    alike = stems.get(stem, ())
    if len(alike) > 1:
        raise InputError(
            f"prompt of {name!r}: may be {alike[0]} or {alike[1]}; give the path in the reference"
        )
    return files[alike[0]] if alike else None


def _sha256(*parts: object) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()
