"""Tasks on this machine: as many Series at once as cores or GPUs allow, on workers that stay warm.

A worker spends seconds on imports and a small Series may train in ten, so groups of ranks stay and are fed one Series
after another through their standard input. A worker saves and ends with the process that started it; one that dies by
itself affects only its own Series.
"""

from __future__ import annotations

import itertools
import os
import signal
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness.dispatch.base import Backend, Handle, SubmitTarget, Task, views_of
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
        """Queue tasks."""
        handles = [Handle(task, f"local-{os.getpid()}-{next(self._numbers)}", name) for task in tasks]
        self.queue += handles
        return handles

    def views(self, handles: Sequence[Handle]) -> Mapping[str, JobView]:
        """Read the workers' replies, start queued tasks that fit, and return the state of each job."""
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
        if JobState.NO_SPACE not in self.ended.values():  # on a full disk no task gets further
            self._start_queued()
        return views_of(handles, self.ended, {group.handle for group in self.groups})

    def cancel(self, handles: Sequence[Handle]) -> None:
        """Do nothing: workers read control.jsonl at each step, leave the Run and stay warm for the next."""

    def logs(self, handle: Handle) -> list[Path]:
        """Return the log of the workers between tasks."""
        return [self.log_dir / "workers.log"]

    def close(self) -> None:
        """Have busy workers save, and end all of them."""
        self.queue.clear()
        for group in self.groups:
            group.stop()
        for group in list(self.groups):
            self._drop(group)

    def _start_queued(self) -> None:
        for handle in list(self.queue):
            group = self._idle_group(handle.task)
            if group is None:
                return  # in order: no task overtakes one that waits for devices
            self.queue.remove(handle)
            group.feed(handle)

    def _idle_group(self, task: Task) -> _Group | None:
        idle = [group for group in self.groups if group.handle is None]
        for group in idle:
            if (group.ranks, group.threads) == (task.ranks, task.threads):
                return group
        need = task.ranks if self.on_gpus else min(task.ranks * task.threads, self.capacity)
        for group in idle:  # groups of another shape give up their devices
            if not self._may_start(need):
                group.stop()
                self._drop(group)
        if not self._may_start(need):
            return None
        devices, self.free_devices = self.free_devices[:need], self.free_devices[need:]
        group = _Group(task.ranks, task.threads, devices, self.log_dir, on_gpus=self.on_gpus)
        self.groups.append(group)
        return group

    def _may_start(self, need: int) -> bool:
        return len(self.free_devices) >= need and len(self.groups) < self.most_groups

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
        """Return True if a rank ended with this status; the other ranks then ended because of it."""
        return any(process.status == status for process in self._processes)

    def feed(self, handle: Handle) -> None:
        self.handle = handle
        for process in self._processes:
            process.feed(handle.task.run_dirs)

    def poll(self) -> tuple[Handle | None, JobState | None]:
        """Return the job that ended since the last call, and its state."""
        for process in self._processes:
            process.listen()
        if all(process.replies for process in self._processes):
            outcome, *_ = [process.replies.pop(0) for process in self._processes]
            state = state_of(outcome)
        elif not self.is_alive:
            state = JobState.LOST
        else:
            return None, None
        handle, self.handle = self.handle, None
        return handle, state

    def stop(self) -> None:
        """Ask its processes to end, after saving if they train."""
        for process in self._processes:
            process.ask_to_stop()

    def end(self) -> None:
        """Wait for its processes to end, and kill those that take too long."""
        seconds = GRACE_SECONDS
        if not self.is_alive:
            for process in self._processes:  # one rank has died, and the others may wait for it for ever
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
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            names = [name.strip() for name in visible if name.strip()]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(
                names[device] if names else str(device) for device in self.devices
            )
        return environment
