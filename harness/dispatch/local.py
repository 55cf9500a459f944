"""Tasks on this machine: as many Series at once as cores or GPUs allow, on workers that stay warm.

A worker spends seconds on imports and a small Series may train in ten, so groups of ranks are kept and fed one
Series after the other through their standard input. A worker dies with the process that started it (it saves
first), and one that dies by itself takes only its own Series along.
"""

from __future__ import annotations

import itertools
import os
import signal
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness.dispatch.base import Backend, Handle, SubmitTarget, Task
from harness.dispatch.worker_process import (
    ALONE_SECONDS,
    GRACE_SECONDS,
    RankProcess,
    environment_of_rank,
    state_of,
)
from harness.plan.cluster import this_machine
from harness.record.jobs import JobState, JobView
from harness.train.stopping import EXIT_NO_SPACE, EXIT_PREEMPTED


class LocalBackend(Backend):
    """Runs tasks in child processes."""

    name = "local"

    def __init__(self, study_dir: Path, target: SubmitTarget, jobs: int | None = None) -> None:
        super().__init__(study_dir, target, jobs)
        cluster = this_machine()
        self.on_gpus = cluster.gpus > 0
        self.capacity = cluster.gpus or cluster.cores
        self.free_devices = list(range(self.capacity))
        self.most_groups = jobs or self.capacity
        self.log_dir = study_dir / "logs"
        self.groups: list[_Group] = []
        self.queue: list[Handle] = []
        self.ended: dict[Handle, JobState] = {}
        self._numbers = itertools.count(1)

    def submit(self, tasks: Sequence[Task], name: str = "") -> list[Handle]:
        """Queue tasks in the order in which they should begin."""
        handles = [Handle(task, f"local-{os.getpid()}-{next(self._numbers)}", name) for task in tasks]
        self.queue += handles
        return handles

    def views(self, handles: Sequence[Handle]) -> Mapping[str, JobView]:
        """Take up what workers said, start what there is room for, and tell where each job is."""
        for group in list(self.groups):
            handle, state = group.poll()
            if not group.is_alive:
                self._drop(group)
                if state is JobState.LOST and group.ended_with(EXIT_NO_SPACE):
                    state = JobState.NO_SPACE
                elif state is JobState.LOST and group.ended_with(EXIT_PREEMPTED):
                    state = JobState.PREEMPTED
            if handle is not None and state is not None:
                self.ended[handle] = state
        if JobState.NO_SPACE not in self.ended.values():  # nothing that is started now would get further
            self._start_queued()
        running = {group.handle for group in self.groups if group.handle is not None}
        states = {handle: JobState.RUNNING if handle in running else JobState.QUEUED for handle in handles}
        return {handle.job_id: handle.view(self.ended.get(handle, states[handle])) for handle in handles}

    def cancel(self, handles: Sequence[Handle]) -> None:
        """Do nothing: workers read control.jsonl at each step, leave the Run and stay warm for the next."""

    def logs(self, handle: Handle) -> list[Path]:
        """Return the log of the workers between tasks."""
        return [self.log_dir / "workers.log"]

    def close(self) -> None:
        """Let idle workers go, have busy ones save and stop, and wait for all of them."""
        self.queue.clear()
        for group in self.groups:
            group.stop()
        for group in list(self.groups):
            self._drop(group)

    def _start_queued(self) -> None:
        for handle in list(self.queue):
            group = self._idle_group(handle.task)
            if group is None:
                return  # in order: nothing overtakes a job that waits for room
            self.queue.remove(handle)
            group.feed(handle)

    def _idle_group(self, task: Task) -> _Group | None:
        idle = [group for group in self.groups if group.handle is None]
        for group in idle:
            if (group.ranks, group.threads) == (task.ranks, task.threads):
                return group
        need = task.ranks if self.on_gpus else min(task.ranks * task.threads, self.capacity)
        for group in idle:  # of another shape: their room is wanted
            if len(self.free_devices) < need or len(self.groups) >= self.most_groups:
                group.stop()
                self._drop(group)
        if len(self.free_devices) < need or len(self.groups) >= self.most_groups:
            return None
        devices, self.free_devices = self.free_devices[:need], self.free_devices[need:]
        group = _Group(task.ranks, task.threads, devices, self.log_dir, on_gpus=self.on_gpus)
        self.groups.append(group)
        return group

    def _drop(self, group: _Group) -> None:
        group.end()
        self.groups.remove(group)
        self.free_devices = sorted(self.free_devices + group.devices)


class _Group:
    """The processes of one warm process group."""

    def __init__(self, ranks: int, threads: int, devices: list[int], log_dir: Path, *, on_gpus: bool) -> None:
        self.ranks, self.threads, self.devices = ranks, threads, devices
        self.handle: Handle | None = None
        log_dir.mkdir(parents=True, exist_ok=True)
        self._meeting = log_dir.absolute() / f".rendezvous-{uuid.uuid4().hex[:8]}"
        self._processes = [
            RankProcess(self._environment(rank, on_gpus=on_gpus), log_dir / "workers.log")
            for rank in range(ranks)
        ]

    @property
    def is_alive(self) -> bool:
        return all(process.status is None for process in self._processes)

    def ended_with(self, status: int) -> bool:
        """Whether a rank ended with this status; the others then end because it did."""
        return any(process.status == status for process in self._processes)

    def feed(self, handle: Handle) -> None:
        self.handle = handle
        for process in self._processes:
            process.feed(handle.task.run_dirs)

    def poll(self) -> tuple[Handle | None, JobState | None]:
        """The job that ended since the last call, and how."""
        for process in self._processes:
            process.listen()
        if self.handle is None:
            return None, None
        if all(process.replies for process in self._processes):
            outcome, *_ = [process.replies.pop(0) for process in self._processes]
            handle, self.handle = self.handle, None
            return handle, state_of(outcome)
        if not self.is_alive:
            handle, self.handle = self.handle, None
            return handle, JobState.LOST
        return None, None

    def stop(self) -> None:
        """Ask for an end: at once where idle, after saving where busy."""
        for process in self._processes:
            process.ask_to_stop()

    def end(self) -> None:
        """Wait for the processes, and kill those that do not end by themselves."""
        seconds = GRACE_SECONDS
        if not self.is_alive:
            for process in self._processes:  # one rank is gone: the others wait for it in vain
                process.signal(signal.SIGTERM)
            seconds = ALONE_SECONDS
        deadline = time.monotonic() + seconds
        for process in self._processes:
            process.end(max(0.0, deadline - time.monotonic()))
        self._meeting.unlink(missing_ok=True)

    def _environment(self, rank: int, *, on_gpus: bool) -> dict[str, str]:
        environment = environment_of_rank(
            rank,
            self.ranks,
            self.threads,
            LOCAL_RANK=str(rank),
            SSMSCALE_RENDEZVOUS=str(self._meeting),
            GLOO_SOCKET_IFNAME="lo",
        )
        if on_gpus:
            shown = [
                name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()
            ]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(
                shown[device] if shown else str(device) for device in self.devices
            )
        return environment
