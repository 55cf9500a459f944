"""Join tracks that share a fact into groups, each of which stays in one split, and report what was joined.

Groups are the connected components of tracks and facts: an artist with two albums, and a guest on one of them, are one
group. The facts are those of group_keys.py, the hash of the decoded sound, and near-duplicates (near.py).
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ssmttm.corpus.manifest import Grouping, Leak
from ssmttm.corpus.source import TrackRef
from ssmttm.corpus.spec import BuildSpec
from ssmttm.corpus.tracks import TrackRecord

NEAR = "near-duplicate"
_PIECE = "piece"
_LEAKS = 20  # of a kind, in the manifest
_TRACKS = 3  # of a leak, for each split


@dataclass(frozen=True)
class Group:
    """Tracks that stay in one split."""

    name: str
    """The first of its pieces' names, from which its split is drawn."""
    tracks: tuple[TrackRecord, ...]
    size: int
    """Number of pieces: of source folder the tracks, of source bach the scores with their versions."""
    by: tuple[str, ...]
    """Kinds of the facts that join it."""


@dataclass(frozen=True)
class Groups:
    """All groups of a corpus, and the facts that join them."""

    groups: tuple[Group, ...]
    shared: Mapping[str, tuple[TrackRecord, ...]]
    """Facts as `kind:value` that two or more tracks share."""


def group_tracks(
    records: Iterable[TrackRecord],
    refs: Iterable[TrackRef],
    spec: BuildSpec,
    near: Iterable[tuple[str, str]] = (),
) -> Groups:
    """Return the groups of tracks, sorted by name; `near` holds pairs of tracks that sound alike."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    tracks = sorted(records, key=lambda record: record.track)
    told = {ref.track: ref.group_keys for ref in refs}
    places = {record.track: place for place, record in enumerate(tracks)}
    members: dict[str, list[int]] = {}
    for place, record in enumerate(tracks):
        for key in dict.fromkeys((*_own_keys(record, spec), *told.get(record.track, ()))):
            members.setdefault(key, []).append(place)
    for pair in near:
        if all(track in places for track in pair):
            members[f"{NEAR}:{' '.join(pair)}"] = [places[track] for track in pair]
    joined = {key: found for key, found in members.items() if len(found) > 1}
    edges = [(place, len(tracks) + row) for row, found in enumerate(joined.values()) for place in found]
    nodes = len(tracks) + len(joined)
    rows, columns = zip(*edges, strict=True) if edges else ((), ())
    graph = coo_array(([1] * len(edges), (rows, columns)), shape=(nodes, nodes))
    _, labels = connected_components(graph, directed=False)
    found_tracks: dict[int, list[TrackRecord]] = {}
    for label, record in zip(labels, tracks, strict=False):
        found_tracks.setdefault(int(label), []).append(record)
    by: dict[int, set[str]] = {}
    for row, key in enumerate(joined):
        by.setdefault(int(labels[len(tracks) + row]), set()).add(kind_of(key))
    groups = [
        Group(
            name=min(record.group for record in found),
            tracks=tuple(found),
            size=len({record.group for record in found}),
            by=tuple(sorted(by.get(label, ()))),
        )
        for label, found in found_tracks.items()
    ]
    shared = {key: tuple(tracks[place] for place in found) for key, found in joined.items()}
    return Groups(tuple(sorted(groups, key=lambda group: group.name)), shared)


def kind_of(key: str) -> str:
    """Return the kind of a fact `kind:value`."""
    return key.partition(":")[0]


def report_groups(
    found: Groups, splits: Mapping[str, Sequence[TrackRecord]], spec: BuildSpec, twins: int, published: str
) -> Grouping:
    """Return what the manifest says of the groups, and of facts on several sides of a published split."""
    largest = max(found.groups, key=lambda group: len(group.tracks))
    where = {record.track: split for split, records in splits.items() for record in records}
    leaking: Counter[str] = Counter()
    leaks: list[Leak] = []
    for key, tracks in sorted(found.shared.items()):
        sides: dict[str, list[str]] = {}
        for record in tracks:
            sides.setdefault(where[record.track], []).append(record.track)
        kind, _, value = key.partition(":")
        if len(sides) > 1:
            leaking[kind] += 1
            if leaking[kind] <= _LEAKS:
                named = "" if kind in ("content", NEAR) else value
                first = {split: tuple(names[:_TRACKS]) for split, names in sorted(sides.items())}
                leaks.append(Leak(by=kind, value=named, tracks=first))
    kinds = [*spec.group_by, *([NEAR] if spec.near_duplicates is not None else [])]
    return Grouping(
        by=tuple(kinds),
        groups=len(found.groups),
        tracks=len(where),
        largest=len(largest.tracks),
        largest_by=largest.by,
        shared=dict(sorted(Counter(map(kind_of, found.shared)).items())),
        twins=twins,
        published=published,
        leaking=dict(sorted(leaking.items())),
        leaks=tuple(leaks),
    )


def _own_keys(record: TrackRecord, spec: BuildSpec) -> list[str]:
    keys = [f"{_PIECE}:{record.group}"]
    if record.facts is not None:
        keys += record.facts.group_keys
        if "content" in spec.group_by and record.facts.content:
            keys.append(f"content:{record.facts.content}")
    return keys
