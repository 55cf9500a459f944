"""The jobs of a build's workers: a track to frames on disk, and a shard's clips to tokens.

Frames are kept a track a file in the build's work folder until all tracks are read and split. For rvq, which is fitted
on the training split first, they are log-mel frames (float16): 23 MB an hour of music at 50 Hz and 64 bands. For a
pretrained codec they are codes: each clip's are those the codec gives to its audio alone. The record of a track is
written after its frames, so that a track with a record is finished and never done again.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError

from ssmttm.codec.base import Codec
from ssmttm.codec.load import load_codec
from ssmttm.codec.mel import LogMel
from ssmttm.codec.rvq import RvqCodec
from ssmttm.corpus.manifest import ShardFacts
from ssmttm.corpus.source import Array, SkipTrackError, Source, TrackFacts, TrackRef
from ssmttm.corpus.spec import BuildSpec
from ssmttm.corpus.writer import shard_name, write_shard
from ssmttm.files import replacing, sha256_file, write_atomically

_CLIPS_AT_ONCE = 8  # handed to a pretrained codec together: 40 MB of audio at 30 s and 44.1 kHz


class TrackRecord(BaseModel):
    """A track that has been read, or the reason why it was not."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    track: str
    piece: str
    group: str
    frames: int
    facts: TrackFacts | None
    skipped: str = ""


class ClipPlace(BaseModel):
    """Where a clip's frames are: `frames` of a track from `start` on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    track: str
    start: int
    frames: int
    number: int
    """Its place in the track."""


class ShardPlan(BaseModel):
    """The clips of one shard."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    split: str
    number: int
    clips: tuple[ClipPlace, ...]


@dataclass
class _Worker:
    spec: BuildSpec
    source: Source
    corpus: Path
    work: Path
    device: str
    opened: Codec | None = None

    @property
    def codec(self) -> Codec:
        """The corpus's codec, loaded once a process."""
        if self.opened is None:
            self.opened = load_codec(self.corpus / "codec", self.device)
        return self.opened


_worker: _Worker | None = None


def make_source(spec: BuildSpec) -> Source:
    """The source a specification names."""
    if spec.source == "bach":
        from ssmttm.corpus.bach import BachSource

        return BachSource(spec)
    from ssmttm.corpus.folder import FolderSource

    return FolderSource(spec)


def start_worker(spec: BuildSpec, corpus: Path, work: Path, device: str) -> None:
    """Tell this process what is being built."""
    global _worker  # noqa: PLW0603  # a process pool has no other place for what all its jobs share
    _worker = _Worker(spec=spec, source=make_source(spec), corpus=corpus, work=work, device=device)


def read_track(ref: TrackRef) -> TrackRecord:
    """Turn one track into frames on disk and return its record."""
    worker = _this_worker()
    try:
        record = _read(worker, ref)
    except SkipTrackError as error:
        record = _record(ref, 0, None, str(error))
    write_atomically(record_file(worker.work, ref.track), record.model_dump_json().encode())
    return record


def finished_record(work: Path, track: str) -> TrackRecord | None:
    """The record an earlier build left of a track, if it left one."""
    try:
        return TrackRecord.model_validate_json(record_file(work, track).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def load_frames(work: Path, track: str, spec: BuildSpec) -> npt.NDArray[np.float16 | np.uint16]:
    """The frames of a finished track by memory map: log-mel (n, bands), or codes (n, codebooks)."""
    fitted = spec.codec == "rvq"
    file = np.memmap(_frames_file(work, track, spec), dtype="<f2" if fitted else "<u2", mode="r")
    return file.reshape(-1, spec.mel_bands if fitted else spec.codebooks)


def encode_shard(plan: ShardPlan) -> tuple[str, int, ShardFacts]:
    """Write one shard of tokens; returns its split, number and facts."""
    worker = _this_worker()
    path = worker.corpus / shard_name(plan.split, plan.number)
    if path.is_file():  # an earlier build wrote it, whole, from the same recipe
        return (
            plan.split,
            plan.number,
            ShardFacts(
                file=shard_name(plan.split, plan.number), clips=len(plan.clips), sha256=sha256_file(path)
            ),
        )
    codes = np.zeros((len(plan.clips), worker.spec.codebooks, worker.spec.frames), dtype=np.uint16)
    for row, clip in enumerate(plan.clips):
        frames = load_frames(worker.work, clip.track, worker.spec)
        part = frames[clip.start : clip.start + clip.frames]
        if worker.spec.codec == "rvq":
            assert isinstance(worker.codec, RvqCodec)
            codes[row, :, : clip.frames] = worker.codec.quantise(part.astype(np.float32))
        else:
            codes[row, :, : clip.frames] = part.T
    return plan.split, plan.number, write_shard(worker.corpus, plan.split, plan.number, codes)


def record_file(work: Path, track: str) -> Path:
    """Where a track's record is; names are hashed since a track's may hold slashes."""
    return work / "tracks" / f"{_hashed(track)}.json"


def _read(worker: _Worker, ref: TrackRef) -> TrackRecord:
    spec = worker.spec
    opened = worker.source.open(ref)
    if spec.codec == "rvq":
        groups: Iterator[npt.NDArray[np.generic]] = (
            group.astype("<f2") for group in mel_of(spec).stream(opened.blocks)
        )
    else:
        groups = (group.astype("<u2") for group in _codes(worker.codec, opened.blocks, spec))
    frames = 0
    with replacing(_frames_file(worker.work, ref.track, spec)) as file:
        for group in groups:
            file.write(group.tobytes())
            frames += len(group)
    skipped = ""
    if frames < spec.min_frames:
        least = spec.min_frames / spec.frame_rate
        skipped = f"{frames / spec.frame_rate:.1f} s long; a clip needs {least:g} s"
    return _record(ref, frames, opened.facts, skipped)


def _record(ref: TrackRef, frames: int, facts: TrackFacts | None, skipped: str) -> TrackRecord:
    return TrackRecord(
        track=ref.track, piece=ref.piece, group=ref.group, frames=frames, facts=facts, skipped=skipped
    )


def mel_of(spec: BuildSpec) -> LogMel:
    """The analysis whose frames rvq is fitted to."""
    return LogMel(sample_rate=spec.sample_rate, frame_rate=int(spec.frame_rate), bands=spec.mel_bands)


def _codes(codec: Codec, blocks: Iterable[Array], spec: BuildSpec) -> Iterator[npt.NDArray[np.uint16]]:
    """The codes (n, codebooks) of a track's clips, one clip after another."""
    clip = spec.frames * round(spec.sample_rate / spec.frame_rate)  # samples
    pieces = _cut(blocks, clip)
    while group := list(islice(pieces, _CLIPS_AT_ONCE)):
        whole = [piece for piece in group if len(piece) == clip]
        for batch in (whole, group[len(whole) :]):
            if batch:
                yield from codec.encode(np.stack(batch)).transpose(0, 2, 1)


def _cut(blocks: Iterable[Array], samples: int) -> Iterator[Array]:
    """A signal in pieces (samples,), the last one maybe shorter."""
    parts: list[Array] = []
    room = samples
    for block in blocks:
        rest = block
        while len(rest) >= room:
            yield np.concatenate([*parts, rest[:room]])
            rest, parts, room = rest[room:], [], samples
        if len(rest):
            parts.append(rest)
            room -= len(rest)
    if parts:
        yield np.concatenate(parts)


def _frames_file(work: Path, track: str, spec: BuildSpec) -> Path:
    return work / "tracks" / f"{_hashed(track)}.{'f16' if spec.codec == 'rvq' else 'u16'}"


def _hashed(track: str) -> str:
    return hashlib.sha256(track.encode()).hexdigest()[:24]


def _this_worker() -> _Worker:
    if _worker is None:
        raise RuntimeError("start_worker has not been called in this process")
    return _worker
