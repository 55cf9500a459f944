"""The stages of a build, in order: read tracks, leave out unusable ones, fit the codec, encode, list the clips.

A pretrained codec is loaded before the tracks are read, and none is fitted.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from time import sleep
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ssmttm.codec.base import CODEC_FILE, Codec
from ssmttm.codec.load import load_codec
from ssmttm.codec.rvq import RvqCodec, RvqConfig
from ssmttm.corpus.bach_captions import place_phrase
from ssmttm.corpus.manifest import MANIFEST, Clip, ShardFacts, Skipped
from ssmttm.corpus.near import near_pairs
from ssmttm.corpus.progress import POLL_SECONDS, Progress, pulsing
from ssmttm.corpus.source import TrackRef
from ssmttm.corpus.spec import BuildSpec
from ssmttm.corpus.split import clips_of, shard_plans
from ssmttm.corpus.tracks import TrackRecord, finished_record, load_chroma, load_frames, mel_of
from ssmttm.corpus.workers import Workers
from ssmttm.errors import InputError

if TYPE_CHECKING:
    from ssmttm.codec.neural import NeuralCodec

SAME_MUSIC = "the same music as another"
"""Begins the reason for leaving out a repeat."""
# Frames the codec is fitted on: enough for k-means (FAISS advises 39 to 256 an entry) and bounded for every corpus;
# 26 MB at 64 bands.
_FIT_FRAMES = 100_000
_FIT_FRAMES_AN_ENTRY = 150
_LOOKERS = 8  # threads that look for finished tracks: what a network disk answers late


def read_tracks(
    workers: Workers, refs: Sequence[TrackRef], spec: BuildSpec, corpus: Path, work: Path, progress: Progress
) -> tuple[list[TrackRecord], float]:
    """Return the record of every track, and the seconds of audio that were read; none is read that has a record.

    Raises FileNotFoundError if another worker has finished the corpus and removed the records.
    """
    with ThreadPoolExecutor(_LOOKERS) as lookers:
        found = lookers.map(lambda ref: finished_record(work, ref), refs)
        finished = {ref.track: record for ref, record in zip(refs, found, strict=True)}
    records = [record for record in finished.values() if record is not None]
    missing = [ref for ref in refs if finished[ref.track] is None]
    if missing and (corpus / MANIFEST).exists():
        raise FileNotFoundError(f"{work}: has no record of {missing[0].track}")
    progress.stage("read tracks", len(refs), len(records))
    frames = 0
    for record in workers.read(missing):
        records.append(record)
        frames += record.frames
        progress.advance(record.frames / spec.frame_rate)
    return records, frames / spec.frame_rate


def usable_tracks(
    records: Iterable[TrackRecord], spec: BuildSpec, *, published: bool = False
) -> tuple[list[TrackRecord], list[Skipped]]:
    """Return the tracks to use, and the others with the reasons; raises InputError if none can be used.

    A repeat of another piece is left out, since its clips would weigh twice; the captions of its file go to the first.
    published: keep repeats, as the published split has them.
    """
    usable: list[TrackRecord] = []
    skipped: list[Skipped] = []
    captions: dict[str, tuple[str, ...]] = {}  # of the repeats, by the first piece
    first: dict[str, str] = {}  # content -> the first piece that has it
    compared = "content" in spec.group_by and not published
    longest = 0
    for record in records:
        longest = max(longest, record.frames)
        content = record.facts.content if record.facts and compared else ""
        original = first.setdefault(content, record.piece) if content else record.piece
        if record.skipped:
            skipped.append(Skipped(track=record.track, reason=record.skipped))
        elif record.frames < spec.min_frames:
            least = spec.min_frames / spec.frame_rate
            reason = f"too short: {record.frames / spec.frame_rate:.1f} s long; a clip needs {least:g} s"
            skipped.append(Skipped(track=record.track, reason=reason))
        elif original != record.piece:
            skipped.append(Skipped(track=record.track, reason=f"{SAME_MUSIC}: {original}"))
            if record.facts and not record.facts.placed:  # a caption with a place is made of the notes alone
                captions[original] = (*captions.get(original, ()), *record.facts.captions)
        else:
            usable.append(record)
    usable = [_with_captions(record, captions.get(record.piece, ())) for record in usable]
    if not usable and longest:
        raise InputError(
            f"segment_seconds is {spec.segment_seconds:g}, but the longest track has only "
            f"{longest / spec.frame_rate:.1f} s"
        )
    if not usable:
        raise InputError(
            f"none of {len(skipped)} tracks can be used; the first, {skipped[0].track}: {skipped[0].reason}"
        )
    return usable, skipped


def near_tracks(records: Sequence[TrackRecord], work: Path, spec: BuildSpec) -> list[tuple[str, str]]:
    """Return pairs of tracks that sound alike; none if the specification does not ask for them."""
    if spec.near_duplicates is None:
        return []
    names = [record.track for record in records]
    pairs = near_pairs(lambda place: load_chroma(work, names[place]), len(names), spec.near_duplicates)
    return [(names[first], names[second]) for first, second in pairs]


def fit_codec(
    folder: Path, work: Path, train: Sequence[TrackRecord], spec: BuildSpec, progress: Progress
) -> Codec:
    """Fit the codec on the training tracks alone and save it in `folder`; load it if it is there already."""
    progress.stage("fit codec", 1, 0)
    codec: Codec
    if (folder / CODEC_FILE).exists():
        codec = load_codec(folder)
    else:
        config = RvqConfig(
            mel=mel_of(spec),
            n_codebooks=spec.codebooks,
            codebook_size=spec.codebook_size,
            seed=spec.seed,
        )
        frames = _frames_to_fit(work, train, spec)
        codec = pulsing(lambda: RvqCodec.fit(frames, config), progress.pulse)
        codec.save(folder)
    progress.advance()
    return codec


def pretrained_codec(spec: BuildSpec, device: str) -> "NeuralCodec | None":
    """Return the pretrained codec of a specification, None for rvq; raises InputError if it cannot be loaded."""
    if spec.codec == "rvq":
        if device != "cpu":
            raise InputError(
                f"--device {device}: codec rvq computes on the cpu; encodec and dac can use cuda"
            )
        return None
    from ssmttm.codec.neural import NeuralCodec

    return NeuralCodec.of_model(spec.codec, spec.codec_model, spec.codebooks, device)


def write_shards(
    workers: Workers,
    splits: dict[str, list[TrackRecord]],
    spec: BuildSpec,
    progress: Progress,
    first: float = 0.0,
) -> dict[str, list[ShardFacts]]:
    """Write the shards of all splits, with the workers of other builds; return their facts in order.

    first: the share of the shards after which to begin, so that each build begins elsewhere.
    """
    plans = [plan for split, records in splits.items() for plan in shard_plans(split, records, spec)]
    begin = int(first * len(plans))
    left = [*plans[begin:], *plans[:begin]]
    progress.stage("write shards", len(plans), 0)
    done: dict[tuple[str, int], ShardFacts] = {}
    while left:
        of_others = []
        for plan, facts in workers.write(left):
            if facts is None:
                of_others.append(plan)
            else:
                done[plan.split, plan.number] = facts
                progress.advance()
        left = of_others
        if left:
            progress.pulse()
            sleep(POLL_SECONDS)
    return {split: [done[key] for key in sorted(done) if key[0] == split] for split in splits}


def clip_lines(records: Iterable[TrackRecord], spec: BuildSpec) -> Iterator[Clip]:
    """Yield the clips of a split in the order of its shards, each with a caption of its track."""
    number = count()
    for record in records:
        facts = record.facts
        assert facts is not None  # usable_tracks leaves such records out
        places = list(clips_of(record, spec))
        for place in places:
            caption = facts.captions[place.number % len(facts.captions)]
            if facts.placed:
                caption = caption.replace("{part}", place_phrase(place.number, len(places)))
                caption = caption[:1].upper() + caption[1:]
            yield Clip(
                clip=next(number),
                track=record.track,
                start_seconds=place.start / spec.frame_rate,
                frames=place.frames,
                caption=caption,
                title=facts.title,
                licence=facts.licence,
            )


def _with_captions(record: TrackRecord, captions: tuple[str, ...]) -> TrackRecord:
    """Return a record with further captions."""
    if record.facts is None or not captions:
        return record
    every = tuple(dict.fromkeys((*record.facts.captions, *captions)))
    return record.model_copy(update={"facts": record.facts.model_copy(update={"captions": every})})


def _frames_to_fit(work: Path, train: Sequence[TrackRecord], spec: BuildSpec) -> npt.NDArray[np.float32]:
    """Return every n-th frame (frames, bands) of the concatenated training tracks."""
    wanted = max(_FIT_FRAMES, _FIT_FRAMES_AN_ENTRY * spec.codebook_size)
    stride = max(1, -(-sum(record.frames for record in train) // wanted))
    parts, offset = [], 0
    for record in train:
        frames = load_frames(work, record.track, spec)
        parts.append(frames[offset::stride].astype(np.float32))
        offset = (offset - record.frames) % stride
    return np.concatenate(parts)
