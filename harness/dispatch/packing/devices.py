"""What is free on each node, device by device, as Ray hands devices out.

A rank takes whole devices of its node, or a share of one of them: Ray never makes up a share from two devices, gives
it on the one with the least room that is enough, and a device of which anything is taken serves no rank that wants
all of it. Two halves that are free on two devices are no device (tried with Ray 2.60, where a placement group that
asks for what only the sum would allow waits, and stops others from being placed).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

DEVICE = 10_000
"""A device in the units in which Ray counts: three thirds are 9,999 of them and fit."""


@dataclass(frozen=True)
class Need:
    """What a group takes: `devices` for each of `ranks`, or `part` of one device for its only rank."""

    ranks: int
    devices: int
    part: int
    """Of DEVICE; 0 where ranks take whole devices."""

    @classmethod
    def of(cls, ranks: int, share: float) -> Self:
        """The need of so many ranks that take that share of a device, or that many devices, each."""
        if share < 1 and ranks == 1:
            return cls(1, 0, max(1, round(share * DEVICE)))
        return cls(ranks, math.ceil(share - 1e-9), 0)

    @property
    def width(self) -> float:
        """Devices in all."""
        return self.part / DEVICE if self.part else float(self.ranks * self.devices)


@dataclass(frozen=True)
class Place:
    """Where a group is: ranks on each node, and which device it shares."""

    ranks: tuple[tuple[int, int], ...]
    """(number of the node, ranks there)."""
    device: str | None = None


class Room:
    """Free devices of some nodes, by the nodes' numbers."""

    def __init__(self, whole: Sequence[int], shared: Sequence[dict[str, int]] | None = None) -> None:
        self.whole = list(whole)
        """Devices of which nothing is taken."""
        self.shared = [dict(found) for found in shared] if shared else [{} for _ in self.whole]
        """Of each node: what is left of a device of which something is taken."""
        self._opened = 0

    def copy(self) -> Room:
        """The same room, to be changed by itself."""
        twin = Room(self.whole, self.shared)
        twin._opened = self._opened
        return twin

    def find(self, need: Need) -> Place | None:
        """Where a group goes: on one node wherever one is large enough, else on as few as can be; None without room."""
        if need.part:
            return self._find_part(need.part)
        wanted = need.ranks * need.devices
        best = None
        for node, free in enumerate(self.whole):
            if free >= wanted and (best is None or free < self.whole[best]):
                best = node  # the tightest, so that a larger one finds room too
        return None if best is None else Place(((best, need.ranks),))

    def find_across(self, need: Need, nodes: int) -> Place | None:
        """Where a group goes that no node is large enough for: on so many, evenly where they have room for that."""
        slots = sorted(
            ((free // need.devices, -node) for node, free in enumerate(self.whole) if free >= need.devices),
            reverse=True,
        )[:nodes]
        if sum(count for count, _ in slots) < need.ranks:
            return None
        even, rest = divmod(need.ranks, nodes)
        if not rest and slots[-1][0] >= even:
            return Place(tuple((-node, even) for _, node in slots))
        left, ranks = need.ranks, []
        for count, node in slots:
            ranks.append((-node, min(count, left)))
            left -= ranks[-1][1]
        return Place(tuple((node, count) for node, count in ranks if count))

    def take(self, need: Need, place: Place) -> Place:
        """Take a place; returns it with the device that is shared."""
        if not need.part:
            for node, ranks in place.ranks:
                self.whole[node] -= ranks * need.devices
            return place
        ((node, _),) = place.ranks
        device, shared = place.device, self.shared[node]
        if device is None:
            self._opened += 1
            device = f"new-{self._opened}"
        if device not in shared:
            self.whole[node] -= 1
            shared[device] = DEVICE
        shared[device] -= need.part
        return Place(place.ranks, device)

    def give(self, need: Need, place: Place) -> None:
        """Give a place back."""
        if not need.part:
            for node, ranks in place.ranks:
                self.whole[node] += ranks * need.devices
            return
        ((node, _),) = place.ranks
        assert place.device is not None
        shared = self.shared[node]
        shared[place.device] += need.part
        if shared[place.device] >= DEVICE:
            del shared[place.device]
            self.whole[node] += 1

    def fitting(self, node: int, part: int) -> str | None:
        """The device of a node on which Ray would give such a part; None for one of which nothing is taken yet."""
        fits = [(room, device) for device, room in self.shared[node].items() if room >= part]
        return min(fits)[1] if fits else None

    def _find_part(self, part: int) -> Place | None:
        open_ones = [
            (room, node, device)
            for node, shared in enumerate(self.shared)
            for device, room in shared.items()
            if room >= part
        ]
        if open_ones:
            _, node, device = min(open_ones)
            return Place(((node, 1),), device)
        free = [(whole, node) for node, whole in enumerate(self.whole) if whole > 0]
        return Place(((min(free)[1], 1),)) if free else None
