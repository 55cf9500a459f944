"""Tasks on this machine: as many Series at once as cores or GPUs allow, on workers that stay warm.

A worker spends seconds on imports and a small Series may train in ten, so groups of ranks stay and are fed one Series
after another through their standard input. A worker saves and ends with the process that started it; one that dies by
itself affects only its own Series.
"""

from __future__ import annotations

import shutil
import signal
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from harness.common.disk import make_folder
from harness.dispatch.base import Handle, SubmitTarget, Task, WarmBackend
from harness.dispatch.worker_process import (
    ALONE_SECONDS,
    GRACE_SECONDS,
    RankProcess,
    environment_of_rank,
    state_at_end,
    state_of,
)
from harness.plan.cluster import this_machine
from harness.plan.resources import CPU_SHARE
from harness.record.heartbeat import Watch, read_beats
from harness.record.jobs import JobState
from harness.train.meeting import make_meeting
from harness.train.stopping import STACK_SECONDS


class LocalBackend(WarmBackend):
    """Runs tasks in child processes."""

    name = "local"

    def __init__(self, study_dir: Path, target: SubmitTarget, jobs: int | None = None) -> None:
        super().__init__(study_dir, target, jobs)
        cluster = this_machine()
        self.on_gpus = cluster.gpus > 0
        self._names = cluster.device_names
        self.capacity = cluster.gpus or cluster.cores
        self.free_devices = list(range(self.capacity))
        self.most_groups = jobs or self.capacity
        self._host_gib = CPU_SHARE * cluster.memory_gib
        self.groups: list[_Group] = []

    def submit(self, tasks: Sequence[Task], name: str = "") -> list[Handle]:
        """Queue tasks; no more start at once than the host's memory holds, though there may be more GPUs."""
        if largest := max((task.ranks * task.host_gib for task in tasks), default=0.0):
            self.most_groups = max(1, min(self.most_groups, int(self._host_gib / largest)))
        return super().submit(tasks, name)

    def logs(self, handle: Handle) -> list[Path]:
        """Return the log of the workers between tasks."""
        return [self.log_dir / "workers.log"]

    def close(self) -> None:
        """Have busy workers save, and end all of them."""
        self.waiting.clear()
        for group in self.groups:
            group.stop()
        for group in list(self.groups):
            self._drop(group)

    def _start_waiting(self) -> None:
        for handle in list(self.waiting.values()):
            group = self._idle_group(handle.task)
            if group is None:
                return  # in order: no task overtakes one that waits for devices
            group.feed(self.waiting.pop(handle.job_id))

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
        visible = ",".join(self._names[device] for device in devices) if self.on_gpus else ""
        group = _Group(task.ranks, task.threads, devices, self.log_dir, visible)
        self.groups.append(group)
        return group

    def _may_start(self, need: int) -> bool:
        return len(self.free_devices) >= need and len(self.groups) < self.most_groups

    def _drop(self, group: _Group) -> None:
        group.end()
        super()._drop(group)
        self.free_devices = sorted(self.free_devices + group.devices)


class _Group:
    """The processes of one warm process group."""

    def __init__(self, ranks: int, threads: int, devices: list[int], log_dir: Path, visible: str) -> None:
        self.ranks, self.threads, self.devices = ranks, threads, devices
        self.handle: Handle | None = None
        self.is_gone = False
        """True if a rank had ended at the last poll or is spent, or nothing moved; all ranks then end because of it."""
        self.stall: str | None = None
        make_folder(log_dir)
        self._meeting = log_dir.absolute() / f".meeting-{uuid.uuid4().hex[:8]}"
        make_meeting(self._meeting)
        self._processes = [
            RankProcess(self._environment(rank, visible), log_dir / "workers.log") for rank in range(ranks)
        ]

    def feed(self, handle: Handle) -> None:
        self.handle = handle
        self._watch = Watch(handle.task.stall_seconds, read_beats(handle.task.folder))
        for process in self._processes:
            process.feed(handle.task.order)

    def poll(self) -> tuple[Handle, JobState] | None:
        """Return the job that ended since the last call, and its state."""
        statuses = {process.status for process in self._processes}
        self.is_gone = statuses != {None} or self.stall is not None
        for process in self._processes:
            process.listen()
        if all(process.replies for process in self._processes):
            outcome, *_ = [process.replies.pop(0) for process in self._processes]
            state = state_of(outcome)
            if any(process.is_spent for process in self._processes):
                self.is_gone = True
                self.stop()
        elif self.is_gone:
            state = state_at_end(statuses)
        else:
            self._end_if_stalled()
            return None
        handle, self.handle = self.handle, None
        return None if handle is None else (handle, state)

    def _end_if_stalled(self) -> None:
        """Kill the processes if nothing has moved for long, after they have written their stacks."""
        if self.handle is None or self.stall is not None:
            return
        signs = [process.is_ready for process in self._processes]
        self.stall = self._watch.look(read_beats(self.handle.task.folder), *signs)
        if self.stall is not None:
            for process in self._processes:
                process.show_stack()
            time.sleep(STACK_SECONDS)
            for process in self._processes:
                process.signal(signal.SIGKILL)

    def stop(self) -> None:
        """Ask its processes to end, after saving if they train."""
        for process in self._processes:
            process.ask_to_stop()

    def end(self) -> None:
        """Wait for its processes to end, and kill those that take too long."""
        seconds = GRACE_SECONDS
        if self.stall is not None:
            seconds = 0.0
        elif any(process.status is not None for process in self._processes):
            for process in self._processes:  # one rank has died, and the others may wait for it for ever
                process.signal(signal.SIGTERM)
            seconds = ALONE_SECONDS
        deadline = time.monotonic() + seconds
        for process in self._processes:
            process.end(max(0.0, deadline - time.monotonic()))
        shutil.rmtree(self._meeting, ignore_errors=True)

    def _environment(self, rank: int, visible: str) -> dict[str, str]:
        # Without GPUs in the plan none is visible: a rank would train there beside others.
        return environment_of_rank(
            rank,
            self.ranks,
            self.threads,
            LOCAL_RANK=str(rank),
            SSMSCALE_MEETING=str(self._meeting),
            CUDA_VISIBLE_DEVICES=visible,
        )
