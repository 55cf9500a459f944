"""Which Series trains where next: pure decisions over what waits, what trains, and what there is room for.

A group of ranks is warm and of one shape; another shape means new processes, whose start costs seconds in which their
devices do nothing. Nothing here talks to Ray.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


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


def decide(
    waiting: Sequence[Piece], groups: Sequence[Group], nodes: Sequence[Node], startup: float
) -> list[Action]:
    """What to do now, in this order; `startup` is how many seconds a group takes to start."""
    del startup
    actions: list[Action] = []
    idle = [group for group in groups if group.busy is None]
    free = {node.key: node.devices for node in nodes}
    for group in groups:
        for key in group.nodes:
            if key in free:
                free[key] -= group.shape.share
    for piece in sorted(waiting, key=lambda piece: (-piece.seconds, piece.key)):
        warm = next((group for group in idle if group.shape == piece.shape), None)
        if warm is not None:
            idle.remove(warm)
            actions.append(Feed(warm, piece))
            continue
        while (places := _places(piece.shape, free)) is None and idle:
            group = idle.pop()
            actions.append(Stop(group))
            for key in group.nodes:
                free[key] = free.get(key, 0.0) + group.shape.share
        if places is None:
            break  # in order: nothing overtakes a Series that waits for room
        for key in places:
            free[key] -= piece.shape.share
        actions.append(Start(piece, places))
    return actions


def _places(shape: Shape, free: Mapping[str, float]) -> tuple[str, ...] | None:
    """A node for each rank, the same for all where one has room; None where there is none."""
    slots = {key: int(room / shape.share + 1e-9) for key, room in free.items()}
    whole = [key for key, room in slots.items() if room >= shape.ranks]
    if whole:
        return (min(whole, key=lambda key: (slots[key], key)),) * shape.ranks
    if sum(slots.values()) < shape.ranks:
        return None
    each = [key for key in sorted(slots, key=lambda key: (-slots[key], key)) for _ in range(slots[key])]
    return tuple(each[: shape.ranks])
