"""The jobs of a build's workers: turn a track into frames on disk, and a shard's clips into tokens.

The build's work folder holds a file of frames for each track until all tracks are read and split. For rvq, which is
first fitted on the training split, they are log-mel frames (float16): 23 MB an hour of music at 50 Hz and 64 bands. For
a pretrained codec they are the codes of each clip's audio, encoded alone. A track's record is written after its frames,
so that a track with a record is finished and never read again.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from filelock import Timeout
from pydantic import ValidationError

from ssmttm.codec.base import Audio, Codec, Codes
from ssmttm.codec.load import load_codec
from ssmttm.codec.mel import LogMel
from ssmttm.codec.rvq import RvqCodec
from ssmttm.corpus.contents import UNKNOWN, FileStamp, current, stamp
from ssmttm.corpus.manifest import ShardFacts
from ssmttm.corpus.near import Fingerprint
from ssmttm.corpus.source import Array, SkipTrackError, Source, TrackFacts, TrackRef
from ssmttm.corpus.spec import BuildSpec
from ssmttm.corpus.writer import shard_name, write_shard
from ssmttm.files import Frozen, read_document, replacing, sha256_file, write_atomically
from ssmttm.locks import file_lock

_CLIPS_AT_ONCE = 8  # encoded together by a pretrained codec: 40 MB of audio at 30 s and 44.1 kHz
_TRIES = 3  # at a file that changes while it is read
_CHANGED = "changed while it was read"


class TrackRecord(Frozen):
    """A track that has been read, or the reason for leaving it out."""

    track: str
    piece: str
    group: str
    frames: int
    facts: TrackFacts | None
    skipped: str = ""
    file: FileStamp | None = None
    """The file that was read, if its content identifies the track."""


class ClipPlace(NamedTuple):
    """A clip: `frames` frames of a track from `start` on."""

    track: str
    start: int
    frames: int
    number: int
    """Index in the track."""


class ShardPlan(NamedTuple):
    """The clips of one shard."""

    split: str
    number: int
    clips: tuple[ClipPlace, ...]


class Encoder(Protocol):
    """Turns audio into tokens, in this process or another."""

    def encode(self, audio: Audio) -> Codes:
        """Return codes (batch, codebooks, frames) of mono audio (batch, samples)."""


@dataclass
class _Worker:
    spec: BuildSpec
    source: Source
    corpus: Path
    work: Path
    device: str
    encoder: Encoder | None
    """Encodes with the pretrained codec; None to load the corpus's own here."""
    pulse: Callable[[], None]

    @cached_property
    def codec(self) -> Codec:
        """The corpus's codec."""
        return load_codec(self.corpus / "codec", self.device)


_worker: _Worker | None = None


def make_source(spec: BuildSpec) -> Source:
    """Return the source that a specification names."""
    if spec.source == "bach":
        from ssmttm.corpus.bach import BachSource

        return BachSource(spec)
    from ssmttm.corpus.folder import FolderSource

    return FolderSource(spec)


def start_worker(
    spec: BuildSpec,
    corpus: Path,
    work: Path,
    device: str,
    encoder: Encoder | None = None,
    pulse: Callable[[], None] = lambda: None,
) -> None:
    """Set what this process builds; `pulse` is called several times within a long track."""
    global _worker  # noqa: PLW0603  # shared by all jobs of a process
    _worker = _Worker(spec, make_source(spec), corpus, work, device, encoder, pulse)


def read_track(ref: TrackRef) -> TrackRecord:
    """Turn one track into frames on disk and return its record."""
    worker = _this_worker()
    for _ in range(_TRIES):
        file = stamp(ref.path) if ref.by_content else None
        try:
            frames, facts = _read(worker, ref)
            end = Decoded(facts, "", file)
        except SkipTrackError as error:
            frames, end = 0, Decoded(None, str(error), file)
        if file is None or current(ref.path, file) is not None:
            break
    else:
        frames, end = 0, Decoded(None, _CHANGED, UNKNOWN)
    return _keep_record(worker.work, ref, frames, end)


class Decoded(NamedTuple):
    """The end of a track's audio: facts of the track, or the reason to leave it out."""

    facts: TrackFacts | None
    skipped: str
    file: FileStamp | None
    """The file that was read, if its content identifies the track."""


def decode_track(ref: TrackRef) -> Iterator[Array | Decoded]:
    """Yield a track's clips in batches (clips, samples) that a codec encodes together, and at last `Decoded`."""
    worker = _this_worker()
    file = stamp(ref.path) if ref.by_content else None
    try:
        opened = worker.source.open(ref)
        heard = _Heard(opened.blocks, worker.spec)
        yield from _batches(heard, worker.spec)
        end = Decoded(heard.keep(worker.work, ref, opened.facts), "", file)
    except SkipTrackError as error:
        end = Decoded(None, str(error), file)
    has_changed = file is not None and current(ref.path, file) is None
    yield Decoded(None, _CHANGED, UNKNOWN) if has_changed else end


def keep_codes(
    work: Path, spec: BuildSpec, ref: TrackRef, end: Decoded, codes: Iterable[Codes]
) -> TrackRecord:
    """Write the codes (batch, codebooks, frames) of a decoded track's batches as its frames; return its record."""
    frames = 0 if end.skipped else _write_frames(work, spec, ref, _frames_of(codes))
    return _keep_record(work, ref, frames, end)


def _keep_record(work: Path, ref: TrackRef, frames: int, end: Decoded) -> TrackRecord:
    record = TrackRecord(track=ref.track, piece=ref.piece, group=ref.group, frames=frames, **end._asdict())
    write_atomically(_file(work, ref.track, "json"), record.model_dump_json().encode())
    return record


def has_record(work: Path, track: str) -> bool:
    """Return True if an earlier build read a track of that name."""
    return _file(work, track, "json").is_file()


def finished_record(work: Path, ref: TrackRef) -> TrackRecord | None:
    """Return the record that an earlier build left of a track, if any and if its file holds the same as then.

    The record says of the track what `ref` says now: captions may have changed meanwhile.
    """
    try:
        record = TrackRecord.model_validate_json(read_document(_file(work, ref.track, "json")))
    except (FileNotFoundError, ValidationError):
        return None
    if record.facts is not None and not record.facts.content:
        return None  # earlier versions took no hash of the sound
    if not ref.by_content:
        return record
    if record.file is None or (file := current(ref.path, record.file)) is None:
        return None
    facts = record.facts
    if facts is not None:
        facts = facts.model_copy(
            update={"captions": ref.captions, "title": ref.title, "licence": ref.licence}
        )
    return record.model_copy(update={"piece": ref.piece, "group": ref.group, "facts": facts, "file": file})


def load_chroma(work: Path, track: str) -> npt.NDArray[np.uint8]:
    """Return the fingerprint (frames, 12) of a finished track by memory map."""
    path = _file(work, track, "chroma")
    if not path.stat().st_size:
        return np.zeros((0, 12), np.uint8)
    return np.memmap(path, dtype=np.uint8, mode="r").reshape(-1, 12)


def load_frames(work: Path, track: str, spec: BuildSpec) -> npt.NDArray[np.float16 | np.uint16]:
    """Return the frames of a finished track by memory map: log-mel (n, bands), or codes (n, codebooks)."""
    fitted = spec.codec == "rvq"
    file = np.memmap(_frames_file(work, track, spec), dtype="<f2" if fitted else "<u2", mode="r")
    return file.reshape(-1, spec.mel_bands if fitted else spec.codebooks)


def encode_shard(plan: ShardPlan) -> tuple[ShardPlan, ShardFacts | None]:
    """Write one shard of tokens; return its facts, None if a worker of another process is writing it."""
    worker = _this_worker()
    name = shard_name(plan.split, plan.number)
    path = worker.corpus / name
    if not path.is_file():
        try:
            with file_lock(worker.work / f"{name}.lock", wait=False):
                if not path.is_file():
                    return plan, _write_shard(worker, plan)
        except Timeout:
            return plan, None
    # Another worker or an earlier build wrote it, whole, from the same recipe.
    return plan, ShardFacts(file=name, clips=len(plan.clips), sha256=sha256_file(path))


def _write_shard(worker: _Worker, plan: ShardPlan) -> ShardFacts:
    codes = np.zeros((len(plan.clips), worker.spec.codebooks, worker.spec.frames), dtype=np.uint16)
    for row, clip in enumerate(plan.clips):
        frames = load_frames(worker.work, clip.track, worker.spec)
        part = frames[clip.start : clip.start + clip.frames]
        if worker.spec.codec == "rvq":
            assert isinstance(worker.codec, RvqCodec)
            codes[row, :, : clip.frames] = worker.codec.quantise(part.astype(np.float32))
        else:
            codes[row, :, : clip.frames] = part.T
    return write_shard(worker.corpus, plan.split, plan.number, codes)


def _read(worker: _Worker, ref: TrackRef) -> tuple[int, TrackFacts]:
    """Write the frames of a track; return their number and its facts."""
    spec = worker.spec
    opened = worker.source.open(ref)
    heard = _Heard(opened.blocks, spec)
    groups: Iterator[npt.NDArray[np.generic]]
    if spec.codec == "rvq":
        groups = mel_of(spec).stream(heard)
    else:
        encoder = worker.encoder or worker.codec
        groups = _frames_of(encoder.encode(batch) for batch in _batches(heard, spec))
    frames = _write_frames(worker.work, spec, ref, groups, worker.pulse)
    return frames, heard.keep(worker.work, ref, opened.facts)


def _write_frames(
    work: Path,
    spec: BuildSpec,
    ref: TrackRef,
    groups: Iterable[npt.NDArray[np.generic]],
    pulse: Callable[[], None] = lambda: None,
) -> int:
    """Write the frames of a track, (n, values) in each group, as they come; return their number."""
    frames, dtype = 0, "<f2" if spec.codec == "rvq" else "<u2"
    with replacing(_frames_file(work, ref.track, spec)) as file:
        for group in groups:
            file.write(group.astype(dtype).tobytes())
            frames += len(group)
            pulse()
    return frames


class _Heard:
    """Blocks of audio, of which the hash and the fingerprint are taken as they pass."""

    def __init__(self, blocks: Iterable[Array], spec: BuildSpec) -> None:
        self._blocks = blocks
        self._hash = hashlib.sha256()
        self.fingerprint = None if spec.near_duplicates is None else Fingerprint(spec.sample_rate)

    def __iter__(self) -> Iterator[Array]:
        for block in self._blocks:
            self._hash.update(np.ascontiguousarray(block, "<f4").tobytes())
            if self.fingerprint is not None:
                self.fingerprint.add(block)
            yield block

    def keep(self, work: Path, ref: TrackRef, facts: TrackFacts) -> TrackFacts:
        """Write the fingerprint of all that passed; return the track's facts, with the hash as its content."""
        if self.fingerprint is not None:
            write_atomically(_file(work, ref.track, "chroma"), self.fingerprint.chroma().tobytes())
        return facts.model_copy(update={"content": facts.content or self._hash.hexdigest()})


def mel_of(spec: BuildSpec) -> LogMel:
    """Return the analysis that gives the frames rvq is fitted to."""
    return LogMel(sample_rate=spec.sample_rate, frame_rate=int(spec.frame_rate), bands=spec.mel_bands)


def _batches(blocks: Iterable[Array], spec: BuildSpec) -> Iterator[Array]:
    """Yield a track's clips in order, in batches (clips, samples) of one length that are encoded together."""
    clip = spec.frames * round(spec.sample_rate / spec.frame_rate)  # samples
    pieces = _cut(blocks, clip)
    while group := list(islice(pieces, _CLIPS_AT_ONCE)):
        for _, batch in groupby(group, len):  # the last clip may be shorter
            yield np.stack(list(batch))


def _frames_of(batches: Iterable[Codes]) -> Iterator[Codes]:
    """Yield the codes (frames, codebooks) of each clip of batches (clips, codebooks, frames)."""
    for batch in batches:
        yield from batch.transpose(0, 2, 1)


def _cut(blocks: Iterable[Array], samples: int) -> Iterator[Array]:
    """Yield a signal in pieces (samples,), of which the last may be shorter."""
    parts: list[Array] = []
    missing = samples
    for block in blocks:
        rest = block
        while len(rest) >= missing:
            yield np.concatenate([*parts, rest[:missing]])
            rest, parts, missing = rest[missing:], [], samples
        if len(rest):
            parts.append(rest)
            missing -= len(rest)
    if parts:
        yield np.concatenate(parts)


def _frames_file(work: Path, track: str, spec: BuildSpec) -> Path:
    return _file(work, track, "f16" if spec.codec == "rvq" else "u16")


def _file(work: Path, track: str, suffix: str) -> Path:
    # Hashed, since the name of a track may hold slashes.
    return work / "tracks" / f"{hashlib.sha256(track.encode()).hexdigest()[:24]}.{suffix}"


def _this_worker() -> _Worker:
    assert _worker is not None, "start_worker has not been called in this process"
    return _worker
