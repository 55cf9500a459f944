"""Supervise submitted tasks: watch them, and give up those that come back again and again with something left.

A job that was lost waits for no other: its room is given to it again as soon as it is known. One that comes back
again and again at the same place is given up.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence

from harness.common.disk import DiskFull, is_read_only
from harness.common.process import last_line
from harness.dispatch.base import Backend, Handle
from harness.record.control import Control
from harness.record.jobs import LIVE, JobState
from harness.train.stopping import MOST_ATTEMPTS

POLL_SECONDS = 0.25
LOOK_SECONDS = 1.0
"""Longest time between two looks at the journals."""
BUSY_SECONDS = 5.0
"""Pause before a Series that another process holds is asked for again."""


class JobSupervisor:
    """The tasks that a process has submitted to a backend and answers for."""

    def __init__(self, control: Control, backend: Backend) -> None:
        self.control, self.backend = control, backend
        self._open: dict[str, Handle] = {}
        self._busy_until: dict[str, float] = {}
        self._losses: dict[str, tuple[str, int]] = {}
        """By Series, where it stood when it was last lost and how often in a row it was lost there."""
        self.trained_at = time.monotonic()
        """When a Series last came back that was not in other hands."""

    @property
    def is_empty(self) -> bool:
        """True if the backend has none of its tasks."""
        return not self._open

    def has(self, series_id: str) -> bool:
        """Return True if the backend has a Series."""
        return series_id in self._open

    def is_busy(self, series_id: str) -> bool:
        """Return True if another process was just found to train a Series."""
        return time.monotonic() < self._busy_until.get(series_id, 0.0)

    def takes(self, series_id: str) -> bool:
        """Return True if a Series may be submitted now: it is not already, nor in other hands."""
        return not self.has(series_id) and not self.is_busy(series_id)

    def leave(self, series_ids: Iterable[str]) -> None:
        """Leave Series that others hold alone for a while."""
        self._busy_until |= dict.fromkeys(series_ids, time.monotonic() + BUSY_SECONDS)

    def watch_over(self, handles: Sequence[Handle]) -> None:
        """Answer for tasks that were submitted."""
        self._open |= {handle.task.series_id: handle for handle in handles}

    def watch(self) -> None:
        """Wait until a task comes back or it is time to look at the journals. Raises what `take_back` raises."""
        deadline = time.monotonic() + LOOK_SECONDS
        while True:
            came_back = self.take_back()
            for handle, state in came_back.items():
                if state not in {JobState.BUSY, JobState.PREEMPTED}:
                    self._count_loss(handle)
            if came_back or time.monotonic() >= deadline:
                return
            time.sleep(POLL_SECONDS)

    def take_back(self) -> Mapping[Handle, JobState]:
        """Take back the tasks that are over; returns how each ended.

        Raises DiskFull as soon as a worker says that no room is left: nothing more would get further.
        """
        views = self.backend.views(list(self._open.values()))
        states = {handle: views[handle.job_id].state for handle in self._open.values()}
        over = {handle: state for handle, state in states.items() if state not in LIVE}
        for handle, state in over.items():
            series_id = handle.task.series_id
            del self._open[series_id]
            if state is JobState.NO_SPACE:
                raise DiskFull(handle.task.folder, is_read_only=is_read_only(handle.task.folder))
            if state is JobState.BUSY:
                self.leave([series_id])
            else:
                self.trained_at = time.monotonic()
        return over

    def _count_loss(self, handle: Handle) -> None:
        """Give up a Series whose workers come back again and again without having finished or failed its Runs."""
        task = handle.task
        left = task.left(self.control)
        if not left:
            return
        stands = task.place()
        before, count = self._losses.get(task.series_id, (stands, 0))
        count = count + 1 if before == stands else 1
        self._losses[task.series_id] = stands, count
        if count < MOST_ATTEMPTS:
            return
        logs = [log for log in (*task.rank_logs, *self.backend.logs(handle)) if log.exists()]
        endings = "; ".join(f"{log} ends: {last_line(log)}" for log in logs)
        del self._losses[task.series_id]  # a retry has as many attempts again
        task.give_up(left, f"its worker ended {count} times at the same place; {endings}")
