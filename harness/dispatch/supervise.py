"""See jobs through: hand them over, watch them, and hand over again what came back with something left to train.

A job that was lost waits for no other: its room is given to it again as soon as it is known. One that comes back
again and again at the same place is given up.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from harness.common.disk import DiskFull, is_read_only
from harness.common.process import last_line
from harness.dispatch.base import Dispatcher, Handle, Job
from harness.record.control import Control
from harness.record.jobs import JobState
from harness.record.root import Root
from harness.record.series import give_up, place, unfinished
from harness.train.stopping import MOST_ATTEMPTS

POLL_SECONDS = 0.25
LOOK_SECONDS = 1.0
"""Longest time between two looks at the journals."""
BUSY_SECONDS = 5.0
"""Pause before a Series that another process holds is asked for again."""


class InHand:
    """The jobs a process has handed to a dispatcher and answers for."""

    def __init__(self, root: Root, control: Control, dispatcher: Dispatcher) -> None:
        self.root, self.control, self.dispatcher = root, control, dispatcher
        self._open: dict[str, Handle] = {}
        self._busy_until: dict[str, float] = {}
        self._losses: dict[str, tuple[str, int]] = {}
        """By Series, where it stood when it was last lost and how often in a row it was lost there."""
        self.trained_at = time.monotonic()
        """When a Series last came back that was not in other hands."""

    @property
    def is_empty(self) -> bool:
        """Whether nothing is with the dispatcher."""
        return not self._open

    def has(self, series_id: str) -> bool:
        """Whether a Series is with the dispatcher."""
        return series_id in self._open

    def takes(self, series_id: str) -> bool:
        """Whether a Series may be handed over now: it is not already, and was not just found in other hands."""
        return series_id not in self._open and time.monotonic() >= self._busy_until.get(series_id, 0.0)

    def hand_over(self, jobs: Sequence[Job]) -> None:
        """Give jobs to the dispatcher, in the order in which they should begin."""
        for handle in self.dispatcher.submit(jobs):
            self._open[handle.job.series_id] = handle

    def watch(self) -> None:
        """Wait until a job comes back or it is time to look at the journals.

        Raises DiskFull as soon as a worker says that no room is left: nothing more would get further.
        """
        deadline = time.monotonic() + LOOK_SECONDS
        while True:
            handles = list(self._open.values())
            ended = {
                handle: state
                for handle, state in self.dispatcher.poll(handles).items()
                if state not in {JobState.QUEUED, JobState.RUNNING}
            }
            for handle, state in ended.items():
                self._take_back(handle, state)
            if ended or time.monotonic() >= deadline:
                return
            time.sleep(POLL_SECONDS)

    def _take_back(self, handle: Handle, state: JobState) -> None:
        del self._open[handle.job.series_id]
        if state is JobState.NO_SPACE:
            folder = self.root.series(handle.job.series_id)
            raise DiskFull(folder, is_read_only=is_read_only(folder))
        if state is JobState.BUSY:
            self._busy_until[handle.job.series_id] = time.monotonic() + BUSY_SECONDS
            return
        self.trained_at = time.monotonic()
        if state is not JobState.PREEMPTED:
            self._count_loss(handle)

    def _count_loss(self, handle: Handle) -> None:
        """Give up a Series whose workers come back again and again without having finished or failed its Runs."""
        job = handle.job
        left = unfinished(job.run_dirs, self.control)
        if not left:
            return
        stands = place(self.root, job.series_id, job.run_dirs)
        before, count = self._losses.get(job.series_id, (stands, 0))
        count = count + 1 if before == stands else 1
        self._losses[job.series_id] = stands, count
        if count < MOST_ATTEMPTS:
            return
        logs = [log for log in self.dispatcher.log_paths(handle) if log.exists()]
        endings = "; ".join(f"{log} ends: {last_line(log)}" for log in logs)
        del self._losses[job.series_id]  # a retry has as many attempts again
        reason = f"its worker ended {count} times at the same place; {endings}"
        give_up(self.root, job.series_id, left, reason)
