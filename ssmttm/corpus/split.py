"""Draw the tracks of a limit, assign tracks to splits, and cut tracks into clips and shards."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from ssmttm.corpus.source import TrackRef
from ssmttm.corpus.spec import BuildSpec
from ssmttm.corpus.tracks import ClipPlace, ShardPlan, TrackRecord
from ssmttm.errors import InputError

SHARD_CLIPS = 1024
"""4 MB of tokens at 4 codebooks and 500 frames; part of the recipe, since shards are hashed."""


def limited(refs: Sequence[TrackRef], spec: BuildSpec) -> list[TrackRef]:
    """Return the tracks of `spec.limit` pieces drawn by the seed, in the source's order."""
    if spec.limit is None:
        return list(refs)
    pieces = sorted({ref.piece for ref in refs}, key=lambda piece: _draw(spec.seed, "limit", piece))
    kept = set(pieces[: spec.limit])
    return [ref for ref in refs if ref.piece in kept]


def split_tracks(records: Iterable[TrackRecord], spec: BuildSpec) -> dict[str, list[TrackRecord]]:
    """Return tracks by split, each group in one split; raises InputError if there are too few."""
    ordered = sorted(records, key=lambda record: record.track)
    groups = sorted({record.group for record in ordered}, key=lambda group: _draw(spec.seed, "split", group))
    held = {
        split: max(1, round(share * len(groups)))
        for split, share in (("valid", spec.valid), ("test", spec.test))
        if share > 0
    }
    if sum(held.values()) >= len(groups):
        raise InputError(
            f"{len(groups)} usable pieces are too few to hold out {sum(held.values())} and train on the rest; "
            "use more music, or set valid and test lower"
        )
    where: dict[str, str] = {}
    start = 0
    for split, n in held.items():
        where |= dict.fromkeys(groups[start : start + n], split)
        start += n
    splits: dict[str, list[TrackRecord]] = {split: [] for split in ("train", *held)}
    for record in ordered:
        splits[where.get(record.group, "train")].append(record)
    return splits


def clips_of(record: TrackRecord, spec: BuildSpec) -> Iterator[ClipPlace]:
    """Yield the clips of a track: whole segments, and the last part if it is long enough."""
    for number, start in enumerate(range(0, record.frames, spec.frames)):
        frames = min(spec.frames, record.frames - start)
        if frames >= spec.min_frames:
            yield ClipPlace(record.track, start, frames, number)


def shard_plans(split: str, records: Iterable[TrackRecord], spec: BuildSpec) -> Iterator[ShardPlan]:
    """Yield the shards of a split, in order."""
    clips = (clip for record in records for clip in clips_of(record, spec))
    number = 0
    while part := tuple(islice(clips, SHARD_CLIPS)):
        yield ShardPlan(split, number, part)
        number += 1


def _draw(seed: int, purpose: str, name: str) -> str:
    return hashlib.sha256(f"{seed}:{purpose}:{name}".encode()).hexdigest()
