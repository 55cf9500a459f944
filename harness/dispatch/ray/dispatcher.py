"""Tasks on a Ray cluster: Series packed on its devices, each in a placement group, on ranks that stay warm.

harness.dispatch.packing decides where each task runs, and this module has Ray do it. Nodes may come and go, and other
users may hold a part of them.
"""

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any, Self

from harness.dispatch import packing
from harness.dispatch.base import Handle, SubmitTarget, Task, WarmBackend
from harness.dispatch.packing import Node, WaitingTask
from harness.dispatch.ray.cluster import START_SECONDS
from harness.dispatch.ray.group import RankGroup, ServerActor
from harness.dispatch.ray.host import RayDown
from harness.dispatch.worker_process import GRACE_SECONDS
from harness.record.control import Control
from harness.record.jobs import JobState
from harness.record.nodes import (
    MOST_BAD_NODES,
    BadNode,
    NodeFailure,
    bad_nodes_in,
    nodes_met_in,
    remember_node,
)
from harness.record.series import scheduler_job
from ssmttm.errors import InputError

log = logging.getLogger("ssmscale.ray")

LOOK_SECONDS = 2.0
"""Interval between two looks for devices: nodes come and go, and other users release theirs."""
NO_NODE_SECONDS = GRACE_SECONDS + START_SECONDS
"""Time to wait for a node that is large enough. A node that died is replaced within that time: its workers save first,
and its successor starts like the first. A `ray start` that hangs ends after 30 s, and harness.dispatch.ray.node_agent
gives the node up at the third failure."""
STARTUP_SECONDS = 15.0
"""Expected start-up time of a group before one has started."""
OVERDUE = 0.15
"""Expected rest of a Series that trains longer than planned, as a share of the time it has trained."""
SETTLE_SECONDS = 10.0
"""Time after which devices that Ray reports as taken count as held by others: it reports releases a moment late."""


class RayDispatcher(WarmBackend):
    """Runs tasks on the Ray cluster to which this process is connected."""

    name = "ray"
    has_one_machine = False
    """True if its nodes are this machine, which no task can avoid."""

    def __init__(self, study_dir: Path, target: SubmitTarget, jobs: int | None = None) -> None:
        super().__init__(study_dir, target, jobs)
        self.groups: list[RankGroup] = []
        self._starts: list[float] = []
        self._decide_at = 0.0
        self._too_few_since: float | None = None
        self._control = Control(self.study_dir / "control.jsonl")
        self._control_size = 0
        """Length of control.jsonl when the bad nodes were last read from it."""
        self._bad: dict[str, BadNode] = {}
        """The nodes that the study avoids, by name."""
        self._servers: dict[str, Any] = {}
        """The ServerActor of each node."""

    def __enter__(self) -> Self:
        """Look at the cluster's nodes and start their rank servers."""
        self.on_gpus = _offer_gpus()
        self._others = Others("GPU" if self.on_gpus else "CPU")
        self._look_after_nodes()
        return self

    def submit(self, tasks: Sequence[Task], name: str = "") -> list[Handle]:
        """Queue tasks; those with the longest expected training begin first."""
        self._decide_at = 0.0
        return super().submit(tasks, name)

    def _poll(self, group: RankGroup) -> tuple[Handle, JobState] | None:
        was_ready = group.is_ready
        found = group.poll()
        if group.is_ready and not was_ready:
            self._starts.append(time.monotonic() - group.began)
        if found is not None:
            log.info("%s: %s, on %s", found[0].task.title, found[1], group.key)
        if found is not None or group.is_gone:
            self._decide_at = 0.0
        if found is not None and group.node_failure is not None and not self.has_one_machine:
            return found[0], self._leave_node(found[0].task, *group.node_failure)
        return found

    def _leave_node(self, task: Task, node: str, reason: str) -> JobState:
        """Remember a bad node, and have the task run elsewhere unless it met several; returns the task's state."""
        name, job = _names().get(node, node), scheduler_job()
        runs = [folder.name for folder in task.left(self._control)]
        log.error("node %s has failed, and not %s: %s", name, task.title, reason)
        remember_node(self._control, name, reason, runs, job.job_id if job else "")
        events = self._control.read()
        if len(met := nodes_met_in(events, runs)) < MOST_BAD_NODES:
            return JobState.PREEMPTED
        bad = bad_nodes_in(events)
        named = "; ".join(str(bad[name]) for name in dict.fromkeys(met) if name in bad)
        task.give_up(task.left(self._control), f"it met {len(met)} bad nodes: {named}")
        return JobState.ENDED

    def _start_waiting(self) -> None:
        if time.monotonic() >= self._decide_at:
            self._decide_at = time.monotonic() + LOOK_SECONDS
            self._decide()

    def logs(self, handle: Handle) -> list[Path]:
        """Return the logs of the workers between tasks."""
        return sorted(self.log_dir.glob("workers-*.log"))

    def close(self) -> None:
        """Have busy workers save, and end all of them."""
        self.waiting.clear()
        for group in self.groups:
            group.let_go(GRACE_SECONDS)
        while self.groups:
            self.views(())
            time.sleep(0.05)

    @property
    def startup(self) -> float:
        """Expected start-up time of a group in seconds."""
        # The first groups wait for their node's imports, and others start at the same time as them.
        return min(self._starts[-3:], default=STARTUP_SECONDS)

    def _decide(self) -> None:
        every, now = self._look_after_nodes(), time.monotonic()
        avoided = self._avoided()
        nodes = [node for node in every if node.key not in avoided]
        for ours in self.groups:
            if ours.handle is None and avoided & set(ours.nodes):
                ours.let_go(GRACE_SECONDS)
        held = {group.key: group for group in self.groups if not group.is_leaving}
        groups = [
            packing.Group(key, group.request, group.nodes, self._busy(group, now), group.device)
            for key, group in held.items()
        ]
        largest = max((node.devices for node in nodes), default=0.0)
        tasks = [
            WaitingTask(key, self._request(handle.task, largest), handle.task.seconds)
            for key, handle in self.waiting.items()
        ]
        if len(fits_nowhere := packing.fits_nowhere(tasks, nodes)) > len(packing.fits_nowhere(tasks, every)):
            self._leave_cluster(len(fits_nowhere) == len(tasks))
        self._refuse_what_fits_nowhere(tasks, nodes)
        free = self._others.remaining(nodes, self._ours())
        for action in packing.decide(tasks, groups, free, self.startup):
            match action:
                case packing.Stop(group):
                    held[group.key].let_go(GRACE_SECONDS)
                case packing.Feed(group, task):
                    log.info("%s: to %s", self.waiting[task.key].task.title, group.key)
                    held[group.key].feed(self.waiting.pop(task.key))
                case packing.Start(task, places) if self._may_start():
                    self._start(self.waiting.pop(task.key), task.request, places)

    def _avoided(self) -> set[str]:
        """Return the Ray ids of the nodes that the study avoids."""
        size = self._control.path.stat().st_size if self._control.path.exists() else 0
        if size != self._control_size and not self.has_one_machine:
            self._bad, self._control_size = bad_nodes_in(self._control.read()), size
        return {key for key, name in _names().items() if name in self._bad} if self._bad else set()

    def _leave_cluster(self, is_all: bool) -> None:
        """Raise NodeFailure if all that is left fits on no node besides bad ones, and nothing trains."""
        if is_all and not self.groups:
            raise NodeFailure(f"too few nodes besides bad ones: {'; '.join(map(str, self._bad.values()))}")

    def _start(self, handle: Handle, request: packing.Request, nodes: tuple[str, ...]) -> None:
        new = RankGroup(request, nodes, self.log_dir, servers=self._servers, on_gpus=self.on_gpus)
        title, count = handle.task.title, len(set(nodes))
        log.info("%s: to %s, %d ranks on %d nodes", title, new.key, len(nodes), count)
        new.feed(handle)
        self.groups.append(new)

    def _ours(self) -> Mapping[str, float]:
        """Return the devices of each node that our groups hold or wait for, including groups that are ending."""
        held: dict[str, float] = defaultdict(float)
        for group in self.groups:
            for node in group.nodes:
                held[node] += group.request.share
        return held

    def _look_after_nodes(self) -> list[Node]:
        """Return the nodes, after starting on each a rank server, which makes its imports before there are ranks."""
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
        """Raise InputError if all that is left are Series too large for the nodes, and no larger node came for long.

        Raises RayDown if there is no node at all: the agent of a node whose raylet hangs does not notice it.
        """
        large = packing.fits_nowhere(tasks, nodes)
        if self.groups or len(large) < len(tasks):
            self._too_few_since = None
            return
        now = time.monotonic()
        self._too_few_since = self._too_few_since or now
        if now - self._too_few_since < NO_NODE_SECONDS:
            return
        task = self.waiting[large[0].key].task
        kind = "GPUs" if self.on_gpus else "cores"
        offered = ", ".join(f"{node.devices:g}" for node in nodes if node.devices)
        if not offered:
            raise RayDown(f"Ray has had no node for {NO_NODE_SECONDS:.0f} s; see the logs of its nodes")
        raise InputError(
            f"{task.title}: takes {large[0].request.share * task.ranks:g} {kind} of one node, or of "
            f"several whole nodes; the nodes of this Ray have {offered}"
        )

    def _may_start(self) -> bool:
        """Return True if another group may start; if not, end an idle group to make that possible."""
        if self.jobs is None or len(self.groups) < self.jobs:
            return True
        if not any(group.is_leaving for group in self.groups):
            idle = next((group for group in self.groups if group.handle is None), None)
            if idle is not None:
                idle.let_go(GRACE_SECONDS)
        return False

    def _busy(self, group: RankGroup, now: float) -> float | None:
        """Return the expected seconds until a group is idle; None if it is."""
        if group.handle is None:
            return None
        expected = group.handle.task.seconds
        if group.is_ready:
            trained = now - group.fed
            return max(expected - trained, OVERDUE * trained)
        return max(0.0, self.startup - (now - group.began)) + expected

    def _request(self, task: Task, largest: float) -> packing.Request:
        """Return the devices of a task; a rank with more threads than the largest node has cores takes all of them."""
        cores = float(max(1, min(task.threads, int(largest))))
        return packing.Request(task.ranks, task.threads, task.gpu_fraction if self.on_gpus else cores)


def _nodes(kind: str) -> list[Node]:
    """Return the live nodes with the number of GPUs or CPU cores of each."""
    import ray

    return [
        Node(node["NodeID"], float(node["Resources"].get(kind, 0.0)))
        for node in sorted(ray.nodes(), key=lambda node: str(node["NodeID"]))
        if node["Alive"]
    ]


def _names() -> dict[str, str]:
    """Return the name of each node by Ray's id."""
    import ray

    return {str(node["NodeID"]): str(node["NodeName"]) for node in ray.nodes()}


def _offer_gpus() -> bool:
    """Return True if the nodes have GPUs; if there is only a head, wait for nodes that are being replaced."""
    until = time.monotonic() + NO_NODE_SECONDS
    while not any(node.devices for node in _nodes("GPU")):
        if any(node.devices for node in _nodes("CPU")) or time.monotonic() > until:
            return False
        time.sleep(LOOK_SECONDS)
    return True


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Be a driver of the Ray cluster at HOST:PORT during the block; Ray ends the driver's actors with it."""
    import ray

    with chdir("/"):  # Ray has its workers import from the driver's folder
        ray.init(address, namespace="ssmscale", log_to_driver=False, logging_level="WARNING")
    try:
        yield
    finally:
        ray.shutdown()


class Others:
    """Devices that other studies or other users of the cluster hold."""

    def __init__(self, kind: str) -> None:
        """`kind` is the device of ranks, GPU or CPU."""
        self.kind = kind
        self._looks: list[tuple[float, dict[str, float]]] = []

    def remaining(self, nodes: Sequence[Node], ours: Mapping[str, float]) -> list[Node]:
        """Return the nodes without the devices of others; `ours` are the devices of this process by node."""
        now, free = time.monotonic(), available()
        taken = {
            # Ray reports a new node a moment late, and leaves out a kind of which nothing is free.
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
        return [node._replace(devices=max(0.0, node.devices - self._held(node.key))) for node in nodes]

    def _held(self, node: str) -> int:
        """Return the number of devices of which others held a part all the time; Ray rounds shares."""
        least = min(taken.get(node, 0.0) for _, taken in self._looks)
        return max(0, math.ceil(least - 0.01))


def available() -> Mapping[str, Mapping[str, Any]]:
    """Return the free resources of each node by its id."""
    from ray._private.state import available_resources_per_node  # documented for developers, but not exported

    return dict(available_resources_per_node())
