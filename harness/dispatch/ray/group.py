"""The ranks of one process group on a Ray cluster, from their placement group to their end.

No method of a group blocks: it reads the replies that have arrived. If a group loses a rank or a node, the whole group
ends, because the ranks of a process group cannot be replaced one by one.

The Ray actor of a rank holds the rank's devices; the rank is a process of its own. Ray ends an actor without warning,
together with its node's raylet or its driver. The kernel then signals the rank, which saves at its next step and ends.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from harness.common.process import read_end
from harness.dispatch.base import Handle
from harness.dispatch.fork_server import RankServer
from harness.dispatch.packing import Request
from harness.dispatch.worker_process import (
    ALONE_SECONDS,
    RankProcess,
    environment_of_rank,
    state_at_end,
    state_of,
)
from harness.record.heartbeat import Beat, Watch, beat_file, read_beat
from harness.record.jobs import JobState
from harness.record.nodes import node_failure_in
from harness.train.meeting import make_meeting
from harness.train.stopping import GPU_SHARE, STACK_SECONDS

LISTEN_SECONDS = 1.0
"""Time that an actor waits for a reply of its rank: an order to stop may wait as long."""
PLACE_SECONDS = 120.0
"""Time that Ray has to place a group before it is placed elsewhere: a hundred times what four actors took on an idle
machine of two cores (1.2 s), and longer than an ending group may hold its devices."""


@dataclass(frozen=True)
class Placement:
    """The node and GPUs of an actor."""

    node: str
    """Ray's id of its node."""
    gpus: tuple[str, ...]
    """The GPUs that Ray assigned to it, as CUDA_VISIBLE_DEVICES names them."""


@dataclass
class _Rank:
    """An actor and the state of its rank."""

    actor: Any
    placement: Placement | None = None
    pending: Any = None
    """Reference to the reply to come: a Placement, a RankReport, or the exit status."""
    outcomes: list[str] = field(default_factory=list)
    beat: Beat | None = None
    status: int | None = None
    is_ready: bool = False
    is_spent: bool = False
    is_gone: bool = False
    """True if the actor or its node died, or its rank has ended."""


class RankGroup:
    """The ranks of one process group, and the Series they train."""

    _numbers = itertools.count(1)

    def __init__(
        self,
        request: Request,
        nodes: tuple[str, ...],
        log_dir: Path,
        *,
        servers: Mapping[str, Any],
        on_gpus: bool,
    ) -> None:
        """Ask Ray to place the group on these nodes; `servers` has the ServerActor of each node."""
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        self.key = f"group-{next(self._numbers)}"
        self.request, self.nodes, self.log_dir, self.on_gpus = request, nodes, log_dir, on_gpus
        self._servers = servers
        self.began = time.monotonic()
        self.handle: Handle | None = None
        self.is_ready = self.is_leaving = self.is_gone = False
        self.stall: str | None = None
        self._is_started = self._is_unplaced = False
        self.node_failure: tuple[str, str] | None = None
        """Node whose failure ended the group, and the line of a log that tells of it."""
        self._lengths: dict[Path, int] = {}
        self.fed = 0.0
        """Time since which it trains its task, by the monotonic clock."""
        self._meeting = log_dir / "meetings" / f"{os.getpid()}-{time.time_ns()}"
        kind = "GPU" if on_gpus else "CPU"
        self._placement_group = placement_group(
            bundles=[{kind: request.share} for _ in nodes],
            strategy="PACK",
            bundle_label_selector=[{"ray.io/node-id": node} for node in nodes],
        )
        make = ray.remote(RankActor)
        self._ranks = [
            _Rank(
                make.options(
                    num_cpus=0 if on_gpus else request.share,
                    num_gpus=request.share if on_gpus else 0,
                    scheduling_strategy=PlacementGroupSchedulingStrategy(
                        placement_group=self._placement_group, placement_group_bundle_index=bundle
                    ),
                ).remote()
            )
            for bundle in range(request.ranks)
        ]
        for rank in self._ranks:
            rank.pending = rank.actor.find_placement.remote()

    @property
    def device(self) -> str | None:
        """The GPU that it shares; None if it shares none, or is not placed yet."""
        placement = self._ranks[0].placement
        if self.request.share < 1 and placement is not None and placement.gpus:
            return placement.gpus[0]
        return None

    def feed(self, handle: Handle) -> None:
        """Have it train a Series as soon as it has started."""
        self.handle = handle
        self.fed = time.monotonic()
        if self._is_started:
            self._feed_ranks()

    def let_go(self, seconds: float) -> None:
        """Have its ranks save and end within `seconds`; `poll` sets `is_gone` once they have."""
        if self.is_leaving:
            return
        self.is_leaving = True
        self._until = time.monotonic() + seconds + 5
        for rank in self._ranks:
            if not rank.is_gone:
                rank.pending = rank.actor.end.remote(seconds)

    def poll(self) -> tuple[Handle, JobState] | None:
        """Return the job that ended since the last call, and its state."""
        from ray.util.placement_group import placement_group_table

        self._listen()
        if self.is_leaving:
            if all(rank.is_gone for rank in self._ranks) or time.monotonic() > self._until:
                self._clear_away()
                return self._give_back(self._state_at_end())
        elif not self._is_started:
            if all(rank.placement is not None for rank in self._ranks):
                self._start()
            elif any(rank.is_gone for rank in self._ranks) or time.monotonic() - self.began > PLACE_SECONDS:
                # Created groups count as placed, even if actors in them died.
                self._is_unplaced = placement_group_table(self._placement_group)["state"] != "CREATED"
                self.let_go(0.0)
        else:
            if not self.is_ready and all(rank.is_ready for rank in self._ranks):
                self.is_ready = True
                self.fed = time.monotonic()
            if all(rank.outcomes for rank in self._ranks):
                outcome, *_ = [rank.outcomes.pop(0) for rank in self._ranks]
                if any(rank.is_spent for rank in self._ranks):
                    self.let_go(ALONE_SECONDS)
                return self._give_back(state_of(outcome))
            if any(rank.is_gone or rank.status is not None for rank in self._ranks):
                self.let_go(ALONE_SECONDS)  # one rank has died, and the others may wait for it for ever
            elif self.handle is not None:
                self._end_if_stalled()
        return None

    def _end_if_stalled(self) -> None:
        """Kill the ranks if nothing has moved for long, after they have written their stacks."""
        beats = {str(number): rank.beat for number, rank in enumerate(self._ranks) if rank.beat is not None}
        self.stall = self._watch.look(beats, *(rank.is_ready for rank in self._ranks))
        if self.stall is not None:
            for rank in self._ranks:
                rank.actor.show_stack.remote()
            self.let_go(0.0)
            self._until += ALONE_SECONDS

    def _give_back(self, state: JobState) -> tuple[Handle, JobState] | None:
        handle, self.handle = self.handle, None
        return None if handle is None else (handle, state)

    def _state_at_end(self) -> JobState:
        """Return the state of the Series that the group was training when it ended."""
        if self._is_unplaced:  # others hold the devices, or a node has gone: this is no failure of the Series
            return JobState.PREEMPTED
        if self.handle is not None and all(rank.outcomes for rank in self._ranks):
            return state_of(self._ranks[0].outcomes.pop(0))
        statuses = {rank.status for rank in self._ranks}
        state = JobState.PREEMPTED if statuses == {0} else state_at_end(statuses)
        if state is JobState.LOST and self.handle is not None:
            for path, node in self._logs():
                if (line := node_failure_in(read_end(path, self._lengths.get(path, 0)))) is not None:
                    self.node_failure = node, line
                    break
        return state

    def _logs(self) -> list[tuple[Path, str]]:
        """Return the logs of its ranks, each with its node: that of the Series, and that of the worker."""
        assert self.handle is not None
        placed = [(number, rank.placement) for number, rank in enumerate(self._ranks) if rank.placement]
        own = [(self.handle.task.folder / "logs" / f"rank-{number}.log", at.node) for number, at in placed]
        return [*own, *((self._log_of(at.node), at.node) for _, at in placed)]

    def _log_of(self, node: str) -> Path:
        return self.log_dir / f"workers-{node[:12]}.log"

    def _listen(self) -> None:
        """Read the replies that have arrived, and ask the ranks for further reports."""
        import ray

        pending = {
            rank.pending: rank for rank in self._ranks if rank.pending is not None and not rank.is_gone
        }
        if not pending:
            return
        arrived, _ = ray.wait(list(pending), num_returns=len(pending), timeout=0)
        for reference in arrived:
            rank = pending[reference]
            rank.pending = None
            try:
                answer = ray.get(reference)
            except ray.exceptions.RayError:  # the actor died, or its node
                rank.is_gone = True
                continue
            if isinstance(answer, Placement):
                rank.placement = answer
            elif isinstance(answer, RankReport):
                rank.is_ready, rank.status, rank.beat = answer.is_ready, answer.status, answer.beat
                rank.is_spent = answer.is_spent
                if answer.outcome is not None:
                    rank.outcomes.append(answer.outcome)
                if rank.status is None and not self.is_leaving:
                    rank.pending = rank.actor.report.remote(LISTEN_SECONDS)
            elif self.is_leaving:
                rank.status, rank.is_gone = answer, True

    def _start(self) -> None:
        placed = [rank.placement for rank in self._ranks if rank.placement is not None]
        make_meeting(self._meeting)
        for number, (rank, placement) in enumerate(zip(self._ranks, placed, strict=True)):
            # Each rank sees all GPUs that the group has on its node, as NCCL recommends.
            beside = [other for other in placed if other.node == placement.node]
            environment = environment_of_rank(
                number,
                self.request.ranks,
                self.request.threads,
                LOCAL_RANK=str([id(other) for other in beside].index(id(placement))),
                SSMSCALE_MEETING=str(self._meeting),
            )
            if self.request.share < 1:
                environment[GPU_SHARE] = str(self.request.share)
            if self.on_gpus:
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpu for other in beside for gpu in other.gpus)
            log = self._log_of(placement.node)
            rank.actor.start.remote(environment, str(log), self._servers[placement.node].address.remote())
            rank.pending = rank.actor.report.remote(LISTEN_SECONDS)
        self._is_started = True
        self._feed_ranks()

    def _feed_ranks(self) -> None:
        assert self.handle is not None
        self._lengths = {path: path.stat().st_size for path, _ in self._logs() if path.exists()}
        task = self.handle.task
        self._watch = Watch(task.stall_seconds)
        for number, rank in enumerate(self._ranks):
            rank.beat = None
            rank.actor.feed.remote(task.order, str(beat_file(task.folder, number)))

    def _clear_away(self) -> None:
        import ray
        from ray.util.placement_group import remove_placement_group

        for rank in self._ranks:
            ray.kill(rank.actor)
        remove_placement_group(self._placement_group)
        shutil.rmtree(self._meeting, ignore_errors=True)
        self.is_gone = True


@dataclass(frozen=True)
class RankReport:
    """A report of a rank's actor."""

    is_ready: bool
    """True once the rank has made its imports and found the others."""
    outcome: str | None = None
    """Outcome of the Series it was fed; None while it trains."""
    status: int | None = None
    """Exit status of the rank; None while it runs."""
    beat: Beat | None = None
    """Its heartbeat, read on its node; None before it trains."""
    is_spent: bool = False
    """True if it has lost memory to the last Series, and another process should train the next one."""


class ServerActor:
    """The actor that runs the rank server of a node; it holds no device."""

    def __init__(self, log: str) -> None:
        self._log = Path(log)
        self._server: RankServer | None = None
        with contextlib.suppress(OSError):
            self._server = RankServer(self._log)

    def address(self) -> str | None:
        """Return the address of the rank server; None if ranks have to be plain processes."""
        if self._server is not None and not self._server.is_alive:
            self._server = RankServer(self._log)
        return self._server.address if self._server else None


class RankActor:
    """The actor of one rank; Ray runs its methods one after another, so none may take long."""

    _process: RankProcess
    _beat_file = Path(os.devnull)
    _beat_before: Beat | None = None
    """Heartbeat of an earlier attempt."""

    def find_placement(self) -> Placement:
        """Return its node and its GPUs."""
        import ray

        context = ray.get_runtime_context()
        gpus = context.get_accelerator_ids().get("GPU", [])
        return Placement(context.get_node_id(), tuple(str(gpu) for gpu in gpus))

    def start(self, environment: Mapping[str, str], log: str, server: str | None) -> None:
        """Start the rank, by its node's rank server if there is one."""
        self._process = RankProcess(environment, Path(log), server)

    def feed(self, order: JsonValue, beat_file: str) -> None:
        """Have the rank do the work of an order; its heartbeat will be in that file."""
        self._beat_file = Path(beat_file)
        self._beat_before = read_beat(self._beat_file)
        self._process.feed(order)

    def report(self, seconds: float) -> RankReport:
        """Return the rank's state, waiting up to `seconds` for a change."""
        rank = self._process
        rank.wait_for_reply(seconds)
        beat = read_beat(self._beat_file)
        outcome = rank.replies.pop(0) if rank.replies else None
        beat = None if beat == self._beat_before else beat
        return RankReport(rank.is_ready, outcome, rank.status, beat, is_spent=rank.is_spent)

    def show_stack(self) -> None:
        """Have the rank write its stack into its log."""
        self._process.show_stack()
        time.sleep(STACK_SECONDS)

    def end(self, seconds: float) -> int | None:
        """Have the rank, if it was started, save and end; kill it after `seconds`, and return its exit status."""
        if not hasattr(self, "_process"):
            return None
        self._process.ask_to_stop()
        self._process.end(seconds)
        return self._process.status
