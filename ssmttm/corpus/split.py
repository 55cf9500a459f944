"""Draw the tracks of a limit, assign tracks to splits, and cut tracks into clips and shards."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice

from ssmttm.corpus.groups import Group, Groups
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


def split_tracks(
    found: Groups, spec: BuildSpec, published: Mapping[str, str] | None = None
) -> dict[str, list[TrackRecord]]:
    """Return tracks by split, each group in one split; raises InputError if there are too few.

    published: splits by track, which are kept; the other splits are drawn from its training tracks.
    """
    published = published or {}
    given = {split for split in published.values() if split != "train"}
    shares = {split: share for split, share in spec.held_shares.items() if share > 0 and split not in given}
    free = [
        group
        for group in found.groups
        if all(published.get(record.track, "train") == "train" for record in group.tracks)
    ]
    held = _held_out(free, shares, spec.seed)
    order = [split for split in ("valid", "test") if split in shares or split in given]
    splits: dict[str, list[TrackRecord]] = {split: [] for split in ("train", *order)}
    drawn = {
        record.track: split for split, groups in held.items() for group in groups for record in group.tracks
    }
    for record in sorted((one for group in found.groups for one in group.tracks), key=lambda one: one.track):
        splits[drawn.get(record.track, published.get(record.track, "train"))].append(record)
    empty = [split for split, records in splits.items() if not records]
    if empty:
        raise InputError(f"the published split has no usable track in {empty[0]}; check `splits` and `limit`")
    return splits


def _held_out(groups: Sequence[Group], shares: Mapping[str, float], seed: int) -> dict[str, list[Group]]:
    """Return the groups of each held-out split, whose pieces are about their share of all pieces.

    Groups are taken in the order of the draw, and a group that would miss the share by more than it is missed
    without the group is passed over. Groups of one piece make the same splits as a count of groups.
    """
    left = sorted(groups, key=lambda group: _draw(seed, "split", group.name))
    pieces = sum(group.size for group in groups)
    wanted = {split: max(1, round(share * pieces)) for split, share in shares.items()}
    held: dict[str, list[Group]] = {}
    for split, wish in wanted.items():
        held[split] = taken = []
        missing = wish
        for group in left:
            if 0 < group.size < 2 * missing:
                taken.append(group)
                missing -= group.size
        if not taken and left:
            taken.append(min(left, key=lambda group: group.size))
        names = {group.name for group in taken}
        left = [group for group in left if group.name not in names]
    if shares and (not left or not all(held.values()) or sum(wanted.values()) >= pieces):
        most = max(groups, key=lambda group: group.size, default=None)
        joined = (
            f" in {len(groups)} groups, of which one has {most.size} by {', '.join(most.by)}"
            if most is not None and most.size > 1
            else ""
        )
        advice = " or group by less (group_by)" if joined else ""
        raise InputError(
            f"{pieces} usable pieces{joined} are too few to hold out {sum(wanted.values())} and train on the rest; "
            f"use more music, set valid and test lower{advice}"
        )
    return held


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
