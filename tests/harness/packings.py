"""A packing in simulated time, with the actions of a dispatcher and the time that the devices take."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from harness.dispatch.packing import Action, Feed, Group, Node, Request, Start, Stop, WaitingTask, decide

Decide = Callable[[Sequence[WaitingTask], Sequence[Group], Sequence[Node], float], list[Action]]


@dataclass
class _Held:
    """A group that exists, with the task it trains."""

    group: Group
    device: int | None
    task: WaitingTask | None = None
    begun: float = 0.0
    ends: float = math.inf


@dataclass
class Simulation:
    """Devices given out as Ray does, groups that start in `startup` seconds, and Series of given lengths."""

    tasks: Sequence[WaitingTask]
    nodes: list[Node]
    startup: float
    decide: Decide = decide
    actual: Mapping[str, float] = field(default_factory=dict)
    """Real seconds of a Series that takes longer or shorter than expected."""
    vanishing: float = math.inf
    """Time when all nodes but the first vanish."""

    now: float = 0.0
    starts: int = 0
    done: dict[str, float] = field(default_factory=dict)
    held: dict[str, _Held] = field(default_factory=dict)

    def begin(self, groups: Sequence[Group]) -> None:
        """Begin with these groups, busy with tasks that do not count."""
        for group in groups:
            task = WaitingTask(f"before-{group.key}", group.request, group.busy or 0.0)
            self.held[group.key] = _Held(group, None, task, 0.0, group.busy or 0.0)

    def run(self) -> float:
        """Carry everything out; returns the seconds until the last Series has ended."""
        self.waiting = {task.key: task for task in self.tasks}
        self._carry_out()
        while self.waiting or any(held.task for held in self.held.values()):
            self.now = min([self.vanishing, *(held.ends for held in self.held.values())])
            assert self.now < math.inf, f"nothing happens any more, and {sorted(self.waiting)} wait"
            if self.now == self.vanishing:
                self._lose_nodes()
            for held in self.held.values():
                if held.task and held.ends <= self.now:
                    self.done[held.task.key] = self.now
                    held.task, held.ends = None, math.inf
            self._carry_out()
        return max(self.done.values())

    def used(self, node: Node) -> list[float]:
        """Return the share taken of each device of a node."""
        taken = [0.0] * int(node.devices)
        whole = 0
        for held in self.held.values():
            share = held.group.request.share
            if held.device is not None and held.group.nodes[0] == node.key:
                taken[held.device] += share
            elif held.device is None:
                whole += held.group.nodes.count(node.key) * math.ceil(share)
        empty = [device for device, part in enumerate(taken) if not part]
        assert whole <= len(empty), (
            f"{whole} devices of {node.key} are wanted whole, and {len(empty)} are free"
        )
        for device in empty[:whole]:
            taken[device] = 1.0
        assert all(part <= 1.0 + 1e-6 for part in taken), taken
        return taken

    def _carry_out(self) -> None:
        for action in self.decide(list(self.waiting.values()), self._groups(), self.nodes, self.startup):
            if isinstance(action, Stop):
                assert self.held[action.group.key].task is None, "a group that trains is stopped"
                del self.held[action.group.key]
            elif isinstance(action, Feed):
                held = self.held[action.group.key]
                assert held.task is None, "a group that trains is fed"
                assert held.group.request == action.task.request, "a group is fed a task of another shape"
                self._train(held, action.task.key, 0.0)
            else:
                self._start(action)

    def _start(self, start: Start) -> None:
        self.starts += 1
        request = start.task.request
        assert len(start.nodes) == request.ranks
        device = None
        if (
            request.share < 1 and request.ranks == 1
        ):  # as Ray does: the device with the least share left that is enough
            (node,) = [node for node in self.nodes if node.key == start.nodes[0]]
            fits = [
                (1 - part, at) for at, part in enumerate(self.used(node)) if 1 - part >= request.share - 1e-6
            ]
            assert fits, f"no device of {node.key} has {request.share} left"
            device = min(fits)[1]
        key = f"group-{self.starts}"
        self.held[key] = _Held(Group(key, request, start.nodes, None), device)
        for node in self.nodes:
            self.used(node)
        self._train(self.held[key], start.task.key, self.startup)

    def _train(self, held: _Held, key: str, startup: float) -> None:
        task = self.waiting.pop(key)
        held.task, held.begun = task, self.now + startup
        held.ends = held.begun + self.actual.get(key, task.seconds)

    def _groups(self) -> list[Group]:
        groups = []
        for held in self.held.values():
            busy = None
            if held.task:
                busy = max(0.0, held.begun + held.task.seconds - self.now)
            groups.append(
                replace(held.group, busy=busy, device=None if held.device is None else str(held.device))
            )
        return groups

    def _lose_nodes(self) -> None:
        self.nodes, self.vanishing = self.nodes[:1], math.inf
        for held in list(self.held.values()):
            if not set(held.group.nodes) <= {node.key for node in self.nodes}:
                if held.task:
                    self.waiting[held.task.key] = held.task
                del self.held[held.group.key]


def lower_bound(
    tasks: Sequence[WaitingTask], nodes: Sequence[Node], actual: Mapping[str, float] | None = None
) -> float:
    """Return the lower bound of every packing: the longest Series, or all device-seconds on all devices."""
    seconds = {task.key: (actual or {}).get(task.key, task.seconds) for task in tasks}
    work = sum(seconds[task.key] * task.request.ranks * task.request.share for task in tasks)
    return max(*seconds.values(), work / sum(node.devices for node in nodes))


def mixed(seed: int, count: int = 24, *, longest: float = 300.0) -> list[WaitingTask]:
    """Return Series of one, two and four devices in turn, between a tenth of the longest and the longest."""
    rolled = random.Random(seed)
    return [
        WaitingTask(f"p{at:03}", Request((1, 2, 4)[at % 3], 1), rolled.uniform(longest / 10, longest))
        for at in range(count)
    ]
