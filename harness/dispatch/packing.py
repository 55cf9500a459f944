"""Choose which task trains where next: longest first with backfill, and devices reserved for a task that needs several.

Decisions are pure functions of waiting tasks, groups of ranks and nodes; nothing here talks to Ray. A group of ranks
is warm and has one shape; another shape needs new processes, which leave their devices idle for seconds as they start.

A rank takes whole devices of its node, or a share of one. Ray never adds up a share from two devices, places it on the
device that has the least left and enough, and gives a whole device only if nothing of it is taken: two devices with a
half free each do not serve a rank that needs a device (Ray 2.60: a placement group that only their sum would satisfy
waits, and blocks others).
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

DEVICE = 10_000
"""A device in Ray's units: three thirds are 9,999 of them and fit."""
EPSILON = 1e-9


@dataclass(frozen=True)
class Request:
    """Devices that a task needs, or that a group of ranks holds."""

    ranks: int
    threads: int
    """CPU cores of a rank."""
    share: float = 1.0
    """Devices of a rank: a GPU, or a part of one for a task of one rank; without GPUs, its `threads` cores."""

    @property
    def part(self) -> int:
        """Part of a device that the only rank takes, in units of 1 / DEVICE; 0 if ranks take whole devices."""
        return max(1, round(self.share * DEVICE)) if self.share < 1 and self.ranks == 1 else 0

    @property
    def devices(self) -> int:
        """Number of whole devices of each rank; 0 if the only rank shares one."""
        return 0 if self.part else math.ceil(self.share - EPSILON)

    @property
    def width(self) -> float:
        """Devices of all ranks together."""
        return self.part / DEVICE if self.part else float(self.ranks * self.devices)


@dataclass(frozen=True)
class Group:
    """A group of ranks that trains a task or is warm and idle."""

    key: str
    request: Request
    nodes: tuple[str, ...]
    """The node of each rank."""
    busy: float | None
    """Expected seconds until it is idle; None if it is."""
    device: str | None = None
    """Ray's number of the device it shares; None if it shares none, or if not yet known."""


class WaitingTask(NamedTuple):
    """A task that waits for devices."""

    key: str
    request: Request
    seconds: float
    """Expected training time."""


class Node(NamedTuple):
    """A node and its devices."""

    key: str
    devices: float
    """Number of GPUs, or of CPU cores without GPUs."""


class Start(NamedTuple):
    """Start a group for a task, one rank on each of these nodes."""

    task: WaitingTask
    nodes: tuple[str, ...]


class Feed(NamedTuple):
    """Give a task to an idle group of its shape."""

    group: Group
    task: WaitingTask


class Stop(NamedTuple):
    """End an idle group, because a task needs its devices."""

    group: Group


Action = Start | Feed | Stop


def fits_nowhere(waiting: Sequence[WaitingTask], nodes: Sequence[Node]) -> list[WaitingTask]:
    """Return the tasks that need more devices than these nodes have in all."""
    return [task for task in waiting if not _count_nodes(task.request, nodes)]


def decide(
    waiting: Sequence[WaitingTask], groups: Sequence[Group], nodes: Sequence[Node], startup: float
) -> list[Action]:
    """Return the actions to take now, in this order; `startup` is the start-up time of a group in seconds.

    Tasks are served longest first. If a task has to wait, the devices that are free soonest are reserved for it, so
    that small tasks cannot starve a large one; tasks that end earlier may still use them. Equal arguments give equal
    actions. Tasks that fit nowhere are left out.
    """
    decision = _Decision(waiting, groups, sorted(nodes, key=lambda node: node.key), startup)
    for task in sorted(waiting, key=lambda task: (-task.seconds, task.key)):
        decision.serve(task)
    return decision.actions


class _Decision:
    """The state of one call of `decide`."""

    def __init__(
        self, waiting: Sequence[WaitingTask], groups: Sequence[Group], nodes: Sequence[Node], startup: float
    ) -> None:
        self.actions: list[Action] = []
        self._startup = startup
        self._left = Counter(task.request for task in waiting)
        """Number of tasks of each shape that are not yet served."""
        self._nodes_needed = {request: _count_nodes(request, nodes) for request in self._left}
        self._free = _FreeDevices(nodes)
        self._idle: dict[Request, list[Group]] = defaultdict(list)
        self._busy: list[Group] = []
        there = {node.key for node in nodes}
        for group in sorted(groups, key=lambda group: group.device is None):
            self._free.take(group)  # a group that has lost a node still holds devices of the others
            if there.issuperset(group.nodes):
                (self._idle[group.request] if group.busy is None else self._busy).append(group)
        self._full: set[Request] = set()
        """Shapes that do not fit now."""
        self._reserved_at: dict[str, float] = {}
        """Seconds until a task begins for which a group's devices are reserved, by group."""

    def serve(self, task: WaitingTask) -> None:
        """Give a task to a warm group, start a group for it, or leave it waiting."""
        request = task.request
        nodes_needed = self._nodes_needed[request]
        if not nodes_needed or self._feed(task) or request in self._full:
            return
        soon = sum(
            group.request == request
            and _ends_in(group) <= self._startup
            and group.key not in self._reserved_at
            for group in self._busy
        )
        if self._left[request] <= soon:  # groups will be idle sooner than new ones would have started
            return
        placement = self._free.find(request, nodes_needed) or self._free_devices(request, nodes_needed)
        if placement is None:
            self._full.add(request)
            if not self._reserved_at:
                self._reserve(request, nodes_needed)
            return
        self._left[request] -= 1
        self.actions.append(Start(task, placement))
        group = Group(f"of {task.key}", request, placement, self._startup + task.seconds)
        self._free.take(group)
        self._busy.append(group)

    def _feed(self, task: WaitingTask) -> bool:
        for group in self._idle[task.request]:
            if task.seconds <= self._reserved_at.get(group.key, math.inf):
                self._idle[task.request].remove(group)
                self._busy.append(replace(group, busy=task.seconds))
                self._left[task.request] -= 1
                self.actions.append(Feed(group, task))
                return True
        return False

    def _free_devices(self, request: Request, nodes_needed: int) -> tuple[str, ...] | None:
        """Stop as few idle groups as free the devices of a task; if all together do not, stop none, return None."""
        stopped: list[Group] = []
        for group in self._spare(request):
            self._free.give(group)
            stopped.append(group)
            if self._free.find(request, nodes_needed) is not None:
                break
        is_enough = self._free.find(request, nodes_needed) is not None
        for group in stopped:  # some may stay after all
            self._free.take(group)
            if is_enough and self._free.find(request, nodes_needed) is None:
                self._free.give(group)
                self._idle[group.request].remove(group)
                self.actions.append(Stop(group))
        return self._free.find(request, nodes_needed)

    def _spare(self, request: Request) -> list[Group]:
        """Return the idle groups that may be stopped for a request, closest in width first.

        A group for which a task of its shape waits is stopped only for a wider request, which would never fit else.
        """
        spare: list[Group] = []
        for other, groups in self._idle.items():
            if other != request:
                wanted = 0 if other.width < request.width else self._left[other]
                free = [group for group in groups if group.key not in self._reserved_at]
                spare += free[: max(0, len(free) - wanted)]
        return sorted(spare, key=lambda group: abs(group.request.width - request.width))

    def _reserve(self, request: Request, nodes_needed: int) -> None:
        """Reserve the devices of a request on the nodes where they are all free soonest."""
        if request.part:
            return
        wanted = -(-request.ranks // nodes_needed) * request.devices
        soonest = sorted((self._free_at(node, wanted), node) for node in self._free.whole)[:nodes_needed]
        when = soonest[-1][0]
        # At 0 the devices belong to idle groups for which tasks of their own shape wait: these train first.
        if not 0 < when < math.inf:
            return
        for _, node in soonest:
            have = min(max(0, self._free.whole[node]), wanted)
            self._free.whole[node] -= have
            for _, devices, group in self._ends(node):
                if have >= wanted:
                    break
                have += devices
                self._reserved_at[group.key] = when

    def _free_at(self, node: str, wanted: int) -> float:
        """Return the seconds until a node has this number of free devices."""
        have = max(0, self._free.whole[node])
        if have >= wanted:
            return 0.0
        for busy, devices, _ in self._ends(node):
            have += devices
            if have >= wanted:
                return busy
        return math.inf

    def _ends(self, node: str) -> list[tuple[float, int, Group]]:
        """Return the seconds, devices and group for each group with whole devices of a node, first free first."""
        held = [
            (_ends_in(group), group.nodes.count(node) * group.request.devices, group)
            for group in itertools.chain(self._busy, *self._idle.values())
            if node in group.nodes and group.request.devices
        ]
        return sorted(held, key=lambda entry: entry[0])


def _ends_in(group: Group) -> float:
    return 0.0 if group.busy is None else max(group.busy, EPSILON)


class _FreeDevices:
    """The whole devices free on each node, and the free parts of shared devices."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.whole = {node.key: int(node.devices + EPSILON) for node in nodes}
        self._shared: dict[str, dict[str, int]] = {node.key: {} for node in nodes}
        self._device_of: dict[str, str] = {}
        """Device that each group shares."""

    def find(self, request: Request, nodes_needed: int) -> tuple[str, ...] | None:
        """Return the node of each rank, on as few nodes as possible; None if the request does not fit."""
        if request.part:
            return self._find_part(request.part)
        slots = sorted((free // request.devices, node) for node, free in self.whole.items())
        if nodes_needed == 1:  # the tightest node, which leaves the others to larger groups
            return next(((node,) * request.ranks for count, node in slots if count >= request.ranks), None)
        largest = sorted(slots, key=lambda slot: (-slot[0], slot[1]))[:nodes_needed]
        even, rest = divmod(request.ranks, nodes_needed)
        if not rest and largest[-1][0] >= even:
            return tuple(node for _, node in largest for _ in range(even))
        places = [node for count, node in largest for _ in range(max(0, count))]
        return tuple(places[: request.ranks]) if len(places) >= request.ranks else None

    def take(self, group: Group) -> None:
        """Take the devices of a group."""
        request = group.request
        if not request.part:
            for node in group.nodes:
                if node in self.whole:
                    self.whole[node] -= request.devices
            return
        (node,) = group.nodes
        if node not in self.whole:
            return
        device = (
            group.device or self._device_of.get(group.key) or self._fitting(node, request.part) or group.key
        )
        if device not in self._shared[node]:
            self.whole[node] -= 1
            self._shared[node][device] = DEVICE
        self._shared[node][device] -= request.part
        self._device_of[group.key] = device

    def give(self, group: Group) -> None:
        """Give the devices of a group back."""
        request = group.request
        if not request.part:
            for node in group.nodes:
                self.whole[node] += request.devices
            return
        (node,), device = group.nodes, self._device_of[group.key]
        self._shared[node][device] += request.part
        if self._shared[node][device] >= DEVICE:
            del self._shared[node][device]
            self.whole[node] += 1

    def _fitting(self, node: str, part: int) -> str | None:
        """Return the shared device on which Ray would place this part; None for a device not shared yet."""
        fits = [(left, device) for device, left in self._shared[node].items() if left >= part]
        return min(fits)[1] if fits else None

    def _find_part(self, part: int) -> tuple[str, ...] | None:
        shared = [
            (left, node)
            for node, devices in self._shared.items()
            for left in devices.values()
            if left >= part
        ]
        free = [(whole, node) for node, whole in self.whole.items() if whole > 0]
        best = min(shared or free, default=None)
        return None if best is None else (best[1],)


def _count_nodes(request: Request, nodes: Sequence[Node]) -> int:
    """Return the smallest number of nodes that hold a request; 0 if all together do not."""
    if request.part:
        return int(any(node.devices >= 1 for node in nodes))
    left = request.ranks
    slots = sorted((int(node.devices + EPSILON) // request.devices for node in nodes), reverse=True)
    for count, here in enumerate(slots, start=1):
        left -= here
        if left <= 0:
            return count
    return 0
