"""Jobs on a Ray cluster: Series packed on its GPUs, each in a placement group, on ranks that stay warm.

harness.dispatch.packing decides what goes where; this has Ray do so. Ray's nodes may come and go, and other users may
hold a part of them.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness.dispatch.base import Backend, Handle, SubmitTarget, Task
from harness.dispatch.packing import (
    Feed,
    Group,
    Node,
    Request,
    Start,
    Stop,
    WaitingTask,
    decide,
    fits_nowhere,
)
from harness.dispatch.ray.cluster import START_SECONDS
from harness.dispatch.ray.group import RankGroup, ServerActor
from harness.dispatch.ray.host import RayDown
from harness.dispatch.worker_process import GRACE_SECONDS
from harness.record.jobs import JobState, JobView
from ssmttm.errors import InputError

log = logging.getLogger("ssmscale.ray")

LOOK_SECONDS = 2.0
"""Time between two looks for room that nobody here has made: nodes come and go."""
NO_ROOM_SECONDS = GRACE_SECONDS + START_SECONDS
"""How long Series that fit nowhere are waited for a node with. One that died is replaced within that time: its workers
save first, and its successor starts like the first. What hangs in starting `ray start` ends after 30 s, and the node is
given up at the third time (harness.dispatch.ray.node_agent)."""
STARTUP_SECONDS = 15.0
"""What the start of a group is expected to take until one has been seen."""
OVERDUE = 0.15
"""Share of the time trained so far that a Series is expected to take still, where it takes longer than expected."""


class RayDispatcher(Backend):
    """Runs tasks on the Ray cluster this process is connected to."""

    name = "ray"

    def __init__(self, log_dir: Path, most_groups: int | None = None) -> None:
        """`most_groups` Series are trained at once, where that is given; else as many as there is room for."""
        super().__init__(log_dir.parent, SubmitTarget("ray"), most_groups)
        self.log_dir, self.most_groups = log_dir.absolute(), most_groups
        self.on_gpus = _offer_gpus()
        self.waiting: dict[str, Handle] = {}
        self.ended: dict[Handle, JobState] = {}
        self.groups: list[RankGroup] = []
        self._numbers = itertools.count(1)
        self._starts: list[float] = []
        self._decide_at = 0.0
        self._no_room_since: float | None = None
        self._others = Others("GPU" if self.on_gpus else "CPU")
        self._servers: dict[str, Any] = {}
        """The ServerActor of each node."""
        self._look_after_nodes()

    def submit(self, tasks: Sequence[Task], name: str = "") -> list[Handle]:
        """Take tasks on; which begins first is decided by how long each is expected to take."""
        handles = [Handle(task, f"ray-{os.getpid()}-{next(self._numbers)}", name) for task in tasks]
        self.waiting |= {handle.job_id: handle for handle in handles}
        self._decide_at = 0.0
        return handles

    def views(self, handles: Sequence[Handle]) -> Mapping[str, JobView]:
        """Take up what ranks said, start what there is room for, and tell where each job is."""
        for group in list(self.groups):
            was_ready = group.is_ready
            handle, state = group.poll()
            if group.is_ready and not was_ready:
                self._starts.append(time.monotonic() - group.began)
            if handle is not None and state is not None:
                log.info("series %s: %s, on %s", handle.task.series_id, state, group.key)
                self.ended[handle] = state
                self._decide_at = 0.0
            if group.is_gone:
                self.groups.remove(group)
                self._decide_at = 0.0
        is_full = JobState.NO_SPACE in self.ended.values()  # nothing that is started now would get further
        if self.waiting and not is_full and time.monotonic() >= self._decide_at:
            self._decide_at = time.monotonic() + LOOK_SECONDS
            self._decide()
        running = {group.handle for group in self.groups}
        states = {handle: JobState.RUNNING if handle in running else JobState.QUEUED for handle in handles}
        return {handle.job_id: handle.view(self.ended.get(handle, states[handle])) for handle in handles}

    def cancel(self, handles: Sequence[Handle]) -> None:
        """Do nothing: workers read control.jsonl at each step."""

    def logs(self, handle: Handle) -> list[Path]:
        """Return the logs of the workers between tasks."""
        return [*sorted(self.log_dir.glob("workers-*.log"))]

    def close(self) -> None:
        """Let idle ranks go, have busy ones save and stop, and wait for all of them."""
        self.waiting.clear()
        for group in self.groups:
            group.let_go(GRACE_SECONDS)
        while self.groups:
            for group in list(self.groups):
                group.poll()
                if group.is_gone:
                    self.groups.remove(group)
            time.sleep(0.05)

    @property
    def startup(self) -> float:
        """Seconds a group is expected to take to start."""
        # The first ones wait for their node's imports, and others start beside them.
        return min(self._starts[-3:], default=STARTUP_SECONDS)

    def _decide(self) -> None:
        nodes = self._look_after_nodes()
        now = time.monotonic()
        held = {group.key: group for group in self.groups if not group.is_leaving}
        view = [
            Group(key, group.request, group.nodes, self._busy(group, now), group.device)
            for key, group in held.items()
        ]
        largest = max((node.devices for node in nodes), default=0.0)
        tasks = [
            WaitingTask(key, self._request(handle.task, largest), handle.task.seconds)
            for key, handle in self.waiting.items()
        ]
        self._refuse_what_fits_nowhere(tasks, nodes)
        for action in decide(tasks, view, self._others.remaining(nodes, self._ours()), self.startup):
            match action:
                case Stop(group):
                    held[group.key].let_go(GRACE_SECONDS)
                case Feed(group, task):
                    log.info("series %s: to %s", self.waiting[task.key].task.series_id, group.key)
                    held[group.key].feed(self.waiting.pop(task.key))
                case Start() if not self._may_start():
                    continue
                case Start(task, places):
                    handle = self.waiting.pop(task.key)
                    new = RankGroup(
                        task.request, places, self.log_dir, servers=self._servers, on_gpus=self.on_gpus
                    )
                    log.info(
                        "series %s: to %s, %d ranks on %d nodes",
                        handle.task.series_id,
                        new.key,
                        len(places),
                        len(set(places)),
                    )
                    new.feed(handle)
                    self.groups.append(new)

    def _ours(self) -> Mapping[str, float]:
        """Devices of each node that our groups hold or wait for, also those that are being let go."""
        held: dict[str, float] = defaultdict(float)
        for group in self.groups:
            for node in group.nodes:
                held[node] += group.request.share
        return held

    def _look_after_nodes(self) -> list[Node]:
        """The nodes that are there, each with a rank server that makes its imports before there is a rank."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        nodes = _nodes("GPU" if self.on_gpus else "CPU")
        for node in nodes:
            if node.devices and node.key not in self._servers:
                self._servers[node.key] = (
                    ray.remote(ServerActor)
                    .options(
                        num_cpus=0,
                        max_restarts=-1,
                        scheduling_strategy=NodeAffinitySchedulingStrategy(node.key, soft=False),
                    )
                    .remote(str(self.log_dir / f"workers-{node.key[:12]}.log"))
                )
        return nodes

    def _refuse_what_fits_nowhere(self, tasks: Sequence[WaitingTask], nodes: Sequence[Node]) -> None:
        """Raise InputError where nothing but Series is left that no node has room for, and no node has come since.

        Raises RayDown where there is no node: one whose raylet hangs is not seen to be gone by whoever keeps it.
        """
        large = fits_nowhere(tasks, nodes)
        if self.groups or len(large) < len(tasks):
            self._no_room_since = None
            return
        now = time.monotonic()
        self._no_room_since = self._no_room_since or now
        if now - self._no_room_since < NO_ROOM_SECONDS:
            return
        job = self.waiting[large[0].key].task
        kind = "GPUs" if self.on_gpus else "cores"
        offered = ", ".join(f"{node.devices:g}" for node in nodes if node.devices)
        if not offered:
            raise RayDown(f"Ray has had no node for {NO_ROOM_SECONDS:.0f} s; the logs of its nodes tell why")
        raise InputError(
            f"series {job.series_id}: takes {large[0].request.share * job.ranks:g} {kind}, "
            "a node's own or whole nodes; "
            f"the nodes of this Ray have {offered}"
        )

    def _may_start(self) -> bool:
        """Whether another group may be there; where not, an idle one is let go for it."""
        if self.most_groups is None or len(self.groups) < self.most_groups:
            return True
        if not any(group.is_leaving for group in self.groups):
            idle = next((group for group in self.groups if group.handle is None), None)
            if idle is not None:
                idle.let_go(GRACE_SECONDS)
        return False

    def _busy(self, group: RankGroup, now: float) -> float | None:
        """Seconds until a group is expected to be free; None where it is."""
        if group.handle is None:
            return None
        expected = group.handle.task.seconds
        if group.is_ready:
            trained = now - group.fed
            return max(expected - trained, OVERDUE * trained)
        return max(0.0, self.startup - (now - group.began)) + expected

    def _request(self, task: Task, largest: float) -> Request:
        """What a job takes; more threads than the largest node has cores take all of its cores, as a plan has it."""
        cores = float(max(1, min(task.threads, int(largest))))
        return Request(task.ranks, task.threads, task.gpu_fraction if self.on_gpus else cores)


def _nodes(kind: str) -> list[Node]:
    """The nodes that are there, and how many GPUs or CPU cores each offers."""
    import ray

    return [
        Node(node["NodeID"], float(node["Resources"].get(kind, 0.0)))
        for node in sorted(ray.nodes(), key=lambda node: str(node["NodeID"]))
        if node["Alive"]
    ]


def _offer_gpus() -> bool:
    """Whether the nodes have GPUs; where there is only a head, nodes that are being replaced are waited for."""
    until = time.monotonic() + NO_ROOM_SECONDS
    while not any(node.devices for node in _nodes("GPU")):
        if any(node.devices for node in _nodes("CPU")) or time.monotonic() > until:
            return False
        time.sleep(LOOK_SECONDS)
    return True


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Be a driver of the Ray cluster at HOST:PORT while the block runs; what this driver made ends with it."""
    import ray

    ray.init(address, namespace="ssmscale", log_to_driver=False, logging_level="WARNING")
    try:
        yield
    finally:
        ray.shutdown()


SETTLE_SECONDS = 10.0
"""How long something is held before others count as holding it: Ray reports what was let go here a moment later."""


class Others:
    """What is held of each node by somebody else: another study, or whoever shares the cluster."""

    def __init__(self, kind: str) -> None:
        """`kind` is what ranks take: GPU or CPU."""
        self.kind = kind
        self._looks: list[tuple[float, dict[str, float]]] = []

    def remaining(self, nodes: Sequence[Node], ours: Mapping[str, float]) -> list[Node]:
        """The nodes with what others leave of them; `ours` is what groups of this process hold or wait for there."""
        now, free = time.monotonic(), available()
        taken = {
            # A node that has just come is not told of yet, and a kind of which nothing is free is left out.
            node.key: node.devices - free[node.key].get(self.kind, 0.0) - ours.get(node.key, 0.0)
            for node in nodes
            if node.key in free
        }
        before = [look for look in self._looks if look[0] < now - SETTLE_SECONDS][-1:]
        self._looks = [
            *before,
            *(look for look in self._looks if look[0] >= now - SETTLE_SECONDS),
            (now, taken),
        ]
        return [replace(node, devices=max(0.0, node.devices - self._held(node.key))) for node in nodes]

    def _held(self, node: str) -> int:
        """Devices of which others have held something all the time; shares of one are rounded by Ray."""
        least = min(taken.get(node, 0.0) for _, taken in self._looks)
        return max(0, math.ceil(least - 0.01))


def available() -> Mapping[str, Mapping[str, Any]]:
    """What Ray says is free of each node's resources, by the nodes' ids."""
    from ray._private.state import available_resources_per_node  # public for developers, and nowhere else

    return dict(available_resources_per_node())
