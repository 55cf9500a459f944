"""Choose which task trains where next: longest first, with backfill, and devices kept for a task that needs several.

Pure decisions over what waits, what trains and what is free; nothing here talks to Ray. A group of ranks is warm and of
one shape; another shape means new processes, whose start costs seconds in which their devices do nothing.

A rank takes whole devices of its node, or a share of one of them: Ray never makes up a share from two devices, gives
it on the one with the least left that is enough, and a device of which anything is taken serves no rank that wants
all of it. Two halves that are free on two devices are no device (tried with Ray 2.60, where a placement group that
asks for what only the sum would allow waits, and stops others from being placed).
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

DEVICE = 10_000
"""A device in the units in which Ray counts: three thirds are 9,999 of them and fit."""
EPSILON = 1e-9


@dataclass(frozen=True)
class Request:
    """Devices that a task takes, and that a group of ranks holds."""

    ranks: int
    threads: int
    """CPU cores a rank."""
    share: float = 1.0
    """Devices a rank takes: a GPU, or a part of one where there is one rank; without GPUs, its `threads` cores."""

    @property
    def part(self) -> int:
        """Part of a device that the only rank takes, of DEVICE; 0 where ranks take whole devices."""
        return max(1, round(self.share * DEVICE)) if self.share < 1 and self.ranks == 1 else 0

    @property
    def devices(self) -> int:
        """Whole devices that each rank takes; 0 where the only rank shares one."""
        return 0 if self.part else math.ceil(self.share - EPSILON)

    @property
    def width(self) -> float:
        """Devices in all."""
        return self.part / DEVICE if self.part else float(self.ranks * self.devices)


@dataclass(frozen=True)
class WaitingTask:
    """A task that waits for devices."""

    key: str
    request: Request
    seconds: float
    """How long it is expected to train."""


@dataclass(frozen=True)
class Group:
    """Ranks that are there, training or warm."""

    key: str
    request: Request
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
    """Start a group for a task, a rank on each of these nodes."""

    task: WaitingTask
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Feed:
    """Give a task to an idle group of its shape."""

    group: Group
    task: WaitingTask


@dataclass(frozen=True)
class Stop:
    """Let an idle group go, since its devices are wanted."""

    group: Group


Action = Start | Feed | Stop


def fits_nowhere(waiting: Sequence[WaitingTask], nodes: Sequence[Node]) -> list[WaitingTask]:
    """Return the tasks that these nodes have too few devices for, even where nothing else trains."""
    return [task for task in waiting if not _count_nodes(task.request, nodes)]


def decide(
    waiting: Sequence[WaitingTask], groups: Sequence[Group], nodes: Sequence[Node], startup: float
) -> list[Action]:
    """Return what to do now, in this order; `startup` is how many seconds a group takes to start.

    The longest task comes first. What it waits for is kept for it where that is free soonest, so that no stream of
    small tasks starves a large one; tasks that end before then may still use it. The same arguments give the same
    answer. Tasks that fit nowhere are left out.
    """
    decision = _Decision(waiting, groups, sorted(nodes, key=lambda node: node.key), startup)
    for task in sorted(waiting, key=lambda task: (-task.seconds, task.key)):
        decision.serve(task)
    return decision.actions


class _Decision:
    """What one call of `decide` has come to so far."""

    def __init__(
        self, waiting: Sequence[WaitingTask], groups: Sequence[Group], nodes: Sequence[Node], startup: float
    ) -> None:
        self.actions: list[Action] = []
        self._startup = startup
        self._left = Counter(task.request for task in waiting)
        """Tasks of each shape that are neither started nor passed over."""
        self._nodes_needed = {request: _count_nodes(request, nodes) for request in self._left}
        self._free = _FreeDevices(nodes)
        self._idle: dict[Request, list[Group]] = defaultdict(list)
        self._busy: list[Group] = []
        there = {node.key for node in nodes}
        for group in sorted(groups, key=lambda group: group.device is None):
            self._free.take(group)  # of a group that has lost a node, what it holds of the others
            if there.issuperset(group.nodes):
                (self._idle[group.request] if group.busy is None else self._busy).append(group)
        self._full: set[Request] = set()
        """Shapes for which there is no room."""
        self._kept_until: dict[str, float] = {}
        """By group, when a task begins for which its devices are kept."""

    def serve(self, task: WaitingTask) -> None:
        """Give a task to a warm group or start one, where there is room for it."""
        request = task.request
        nodes_needed = self._nodes_needed[request]
        if not nodes_needed or self._feed(task) or request in self._full:
            return
        soon = sum(
            group.request == request
            and _ends_in(group) <= self._startup
            and group.key not in self._kept_until
            for group in self._busy
        )
        if self._left[request] <= soon:  # a group is free sooner than another would be up
            return
        placement = self._free.find(request, nodes_needed) or self._make_room(request, nodes_needed)
        if placement is None:
            self._full.add(request)
            if not self._kept_until:
                self._keep_devices(request, nodes_needed)
            return
        self._left[request] -= 1
        self.actions.append(Start(task, placement))
        group = Group(f"of {task.key}", request, placement, self._startup + task.seconds)
        self._free.take(group)
        self._busy.append(group)

    def _feed(self, task: WaitingTask) -> bool:
        for group in self._idle[task.request]:
            if task.seconds <= self._kept_until.get(group.key, math.inf):
                self._idle[task.request].remove(group)
                self._busy.append(replace(group, busy=task.seconds))
                self._left[task.request] -= 1
                self.actions.append(Feed(group, task))
                return True
        return False

    def _make_room(self, request: Request, nodes_needed: int) -> tuple[str, ...] | None:
        """Stop idle groups, as few as make room for a task; None, and none stopped, where all would not."""
        stopped: list[Group] = []
        for group in self._spare(request):
            self._free.give(group)
            stopped.append(group)
            if self._free.find(request, nodes_needed) is not None:
                break
        needed = self._free.find(request, nodes_needed) is not None
        for group in stopped:  # those that need not go stay
            self._free.take(group)
            if needed and self._free.find(request, nodes_needed) is None:
                self._free.give(group)
                self._idle[group.request].remove(group)
                self.actions.append(Stop(group))
        return self._free.find(request, nodes_needed)

    def _spare(self, request: Request) -> list[Group]:
        """Return idle groups that another may be started in place of, the likest in width first.

        A group that a task of its own shape waits for goes only for a wider task, which would never find room else.
        """
        spare: list[Group] = []
        for other, groups in self._idle.items():
            if other != request:
                wanted = 0 if other.width < request.width else self._left[other]
                free = [group for group in groups if group.key not in self._kept_until]
                spare += free[: max(0, len(free) - wanted)]
        return sorted(spare, key=lambda group: abs(group.request.width - request.width))

    def _keep_devices(self, request: Request, nodes_needed: int) -> None:
        """Keep free for a task what it waits for, on the nodes where that is all there soonest."""
        if request.part:
            return
        wanted = -(-request.ranks // nodes_needed) * request.devices
        soonest = sorted((self._free_at(node, wanted), node) for node in self._free.whole)[:nodes_needed]
        when = soonest[-1][0]
        if (
            not 0 < when < math.inf
        ):  # at 0, groups are in the way whose own tasks wait: they are not to stand idle
            return
        for _, node in soonest:
            have = min(max(0, self._free.whole[node]), wanted)
            self._free.whole[node] -= have
            for _, devices, group in self._ends(node):
                if have >= wanted:
                    break
                have += devices
                self._kept_until[group.key] = when

    def _free_at(self, node: str, wanted: int) -> float:
        """Return in how many seconds so many devices of a node are free."""
        have = max(0, self._free.whole[node])
        if have >= wanted:
            return 0.0
        for busy, devices, _ in self._ends(node):
            have += devices
            if have >= wanted:
                return busy
        return math.inf

    def _ends(self, node: str) -> list[tuple[float, int, Group]]:
        """Return the groups that hold whole devices of a node, with when they are free and how many they hold."""
        held = [
            (_ends_in(group), group.nodes.count(node) * group.request.devices, group)
            for group in itertools.chain(self._busy, *self._idle.values())
            if node in group.nodes and group.request.devices
        ]
        return sorted(held, key=lambda entry: entry[0])


def _ends_in(group: Group) -> float:
    return 0.0 if group.busy is None else max(group.busy, EPSILON)


class _FreeDevices:
    """Devices of each node of which nothing is taken, and what is left of those that are shared."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.whole = {node.key: int(node.devices + EPSILON) for node in nodes}
        self._shared: dict[str, dict[str, int]] = {node.key: {} for node in nodes}
        self._device_of: dict[str, str] = {}
        """By group, the device that it shares."""

    def find(self, request: Request, nodes_needed: int) -> tuple[str, ...] | None:
        """Return the node of each rank, on as few nodes as can be; None without room."""
        if request.part:
            return self._find_part(request.part)
        slots = sorted((free // request.devices, node) for node, free in self.whole.items())
        if nodes_needed == 1:  # the tightest node, so that a larger group finds room too
            return next(((node,) * request.ranks for count, node in slots if count >= request.ranks), None)
        largest = sorted(slots, key=lambda slot: (-slot[0], slot[1]))[:nodes_needed]
        even, rest = divmod(request.ranks, nodes_needed)
        if not rest and largest[-1][0] >= even:
            return tuple(node for _, node in largest for _ in range(even))
        places = [node for count, node in largest for _ in range(max(0, count))]
        return tuple(places[: request.ranks]) if len(places) >= request.ranks else None

    def take(self, group: Group) -> None:
        """Take what a group holds."""
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
        """Give back what a group holds."""
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
        """Return the device on which Ray would give such a part; None for one of which nothing is taken yet."""
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
    """Return on how many nodes a group has to be, at least; 0 where all together are too few."""
    if request.part:
        return int(any(node.devices >= 1 for node in nodes))
    left = request.ranks
    slots = sorted((int(node.devices + EPSILON) // request.devices for node in nodes), reverse=True)
    for count, here in enumerate(slots, start=1):
        left -= here
        if left <= 0:
            return count
    return 0
