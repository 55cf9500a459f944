"""Which Series trains where next: pure decisions over what waits, what trains, and what there is room for.

A group of ranks is warm and of one shape; another shape means new processes, whose start costs seconds in which their
devices do nothing. Nothing here talks to Ray.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from harness.dispatch.packing.devices import Need, Place, Room
from harness.dispatch.packing.policies import look_ahead
from harness.dispatch.packing.simulate import Lane, Shapes

LEAST_SECONDS = 1e-3
"""What a Series takes of which nothing is known, so that any order has a meaning."""


@dataclass(frozen=True)
class Shape:
    """What a Series takes, and what a group of ranks holds."""

    ranks: int
    threads: int
    """CPU cores a rank."""
    share: float = 1.0
    """Devices a rank takes: a GPU, or a part of one where there is one rank; without GPUs, its `threads` cores."""


@dataclass(frozen=True)
class Piece:
    """A Series that waits."""

    key: str
    shape: Shape
    seconds: float
    """How long it is expected to train."""


@dataclass(frozen=True)
class Group:
    """Ranks that are there, training or warm."""

    key: str
    shape: Shape
    nodes: tuple[str, ...]
    """The node of each rank."""
    busy: float | None
    """Seconds until it is expected to be free; None where it is idle."""
    device: str | None = None
    """Which of its node's devices it shares, as Ray numbers them; None where it shares none, or not yet known."""


@dataclass(frozen=True)
class Node:
    """A node and what it offers."""

    key: str
    devices: float
    """GPUs, or CPU cores where there are no GPUs."""


@dataclass(frozen=True)
class Start:
    """Start a group for a Series, a rank on each of these nodes."""

    piece: Piece
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Feed:
    """Give a Series to an idle group of its shape."""

    group: Group
    piece: Piece


@dataclass(frozen=True)
class Stop:
    """Let an idle group go, since its room is wanted."""

    group: Group


Action = Start | Feed | Stop


def fits_nowhere(waiting: Sequence[Piece], nodes: Sequence[Node]) -> list[Piece]:
    """The Series that these nodes have too few devices for, even where nothing else trains."""
    return [piece for piece in waiting if not _nodes_of(_need(piece.shape), nodes)]


def decide(
    waiting: Sequence[Piece], groups: Sequence[Group], nodes: Sequence[Node], startup: float
) -> list[Action]:
    """What to do now, in this order; `startup` is how many seconds a group takes to start.

    Some policies are followed to their end in simulated time, and the first actions of the one that ends first are
    taken. The same arguments give the same answer. Series that fit nowhere are left out.
    """
    nodes = sorted(nodes, key=lambda node: node.key)
    kinds = sorted(
        {piece.shape for piece in waiting} | {group.shape for group in groups},
        key=lambda shape: (-_need(shape).width, shape.ranks, shape.threads),
    )
    number = {shape: kind for kind, shape in enumerate(kinds)}
    counts = tuple(_nodes_of(_need(shape), nodes) for shape in kinds)
    queues: list[list[Piece]] = [[] for _ in kinds]
    for piece in sorted(waiting, key=lambda piece: (-piece.seconds, piece.key)):
        if counts[number[piece.shape]]:
            queues[number[piece.shape]].append(piece)
    if not any(queues):
        return []
    shapes = Shapes(
        tuple(_need(shape) for shape in kinds),
        counts,
        tuple(tuple(max(piece.seconds, LEAST_SECONDS) for piece in queue) for queue in queues),
    )
    room, lanes = _standing(groups, nodes, number)
    best = look_ahead(shapes, room, lanes, startup)
    taken = [iter(queue) for queue in queues]
    actions: list[Action] = []
    for verb, which, place in best.actions:
        if place is not None:
            keys = tuple(nodes[node].key for node, ranks in place.ranks for _ in range(ranks))
            actions.append(Start(next(taken[which]), keys))
        elif verb == "feed":
            actions.append(Feed(groups[which], next(taken[number[groups[which].shape]])))
        else:
            actions.append(Stop(groups[which]))
    return actions


def _need(shape: Shape) -> Need:
    return Need.of(shape.ranks, shape.share)


def _nodes_of(need: Need, nodes: Sequence[Node]) -> int:
    """On how many nodes a group has to be, at least; 0 where all are too few."""
    if need.part:
        return int(any(node.devices >= 1 for node in nodes))
    left = need.ranks
    slots = sorted((int(node.devices + 1e-9) // need.devices for node in nodes), reverse=True)
    for count, here in enumerate(slots, start=1):
        left -= here
        if left <= 0:
            return count
    return 0


def _standing(
    groups: Sequence[Group], nodes: Sequence[Node], number: Mapping[Shape, int]
) -> tuple[Room, list[Lane]]:
    """What the groups leave free, and the groups as a schedule has them; those on vanished nodes are left out."""
    at = {node.key: index for index, node in enumerate(nodes)}
    room = Room([int(node.devices + 1e-9) for node in nodes])
    lanes = []
    order = sorted(range(len(groups)), key=lambda which: groups[which].device is None)
    for which in order:
        group = groups[which]
        need = _need(group.shape)
        ranks = tuple((at[key], group.nodes.count(key)) for key in dict.fromkeys(group.nodes) if key in at)
        if sum(count for _, count in ranks) < len(group.nodes):
            for node, count in ranks:
                room.whole[node] -= count * need.devices
            continue
        device = group.device
        if need.part and device is None:
            device = room.fitting(ranks[0][0], need.part)
        place = room.take(need, Place(ranks, device))
        busy = 0.0 if group.busy is None else max(group.busy, LEAST_SECONDS)
        lanes.append(Lane(number[group.shape], place, busy, which))
    return room, lanes
