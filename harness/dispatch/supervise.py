"""Supervise submitted tasks: a lost task is submitted again at once, until it is lost repeatedly at the same place."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence

from harness.common.disk import DiskFull, is_read_only
from harness.common.process import describe_end
from harness.dispatch.base import Backend, Handle, Task
from harness.plan.resources import remember, what_would_fit
from harness.record.control import Control
from harness.record.jobs import LIVE, JobState
from harness.record.journal import Journal, read_progress
from harness.record.kinds import OUT_OF_MEMORY, Kind
from harness.record.root import Layout, read_run
from harness.record.series import untrained
from harness.train.stopping import MOST_ATTEMPTS

log = logging.getLogger("ssmscale.dispatch")

POLL_SECONDS = 0.25
LOOK_SECONDS = 1.0
"""Longest interval between two readings of the journals."""
BUSY_SECONDS = 5.0
"""Pause before a Series that another process trains is submitted again."""


KILLED = "the system killed it for memory"


class JobSupervisor:
    """The tasks that this process has submitted to a backend and supervises."""

    def __init__(self, control: Control, backend: Backend) -> None:
        self.control, self.backend = control, backend
        self._open: dict[str, Handle] = {}
        self._since: dict[str, float] = {}
        """Time at which each Series was last submitted, in seconds since 1970."""
        self._busy_until: dict[str, float] = {}
        self._losses: dict[str, tuple[str, int]] = {}
        """By Series, its checkpoints when it was last lost, and the number of losses in a row with these."""
        self._stopped: dict[str, Handle] = {}
        """Newest task of each Series whose workers ended before it was over."""
        self._is_shared = False
        """True if several tasks were running at the last look."""
        self.trained_at = time.monotonic()
        """Time at which this backend last trained a Series, by the monotonic clock."""

    @property
    def is_empty(self) -> bool:
        """True if no submitted task is unfinished."""
        return not self._open

    def has(self, series_id: str) -> bool:
        """Return True if a Series is submitted and unfinished."""
        return series_id in self._open

    def is_busy(self, series_id: str) -> bool:
        """Return True if another process was found to train a Series a moment ago."""
        return time.monotonic() < self._busy_until.get(series_id, 0.0)

    def takes(self, series_id: str) -> bool:
        """Return True if a Series may be submitted now."""
        return not self.has(series_id) and not self.is_busy(series_id)

    def leave(self, series_ids: Iterable[str]) -> None:
        """Submit none of these Series for a while: other processes train them."""
        self._busy_until |= dict.fromkeys(series_ids, time.monotonic() + BUSY_SECONDS)

    def stopped_with_joined(self) -> list[Task]:
        """Return the tasks whose workers ended before they had trained all Runs that joined them."""
        tasks = [handle.task for handle in self._stopped.values()]
        return [task for task in tasks if self.takes(task.series_id) and task.work().joined()]

    def watch_over(self, handles: Sequence[Handle]) -> None:
        """Supervise these submitted tasks."""
        self._open |= {handle.task.series_id: handle for handle in handles}
        self._since |= dict.fromkeys((handle.task.series_id for handle in handles), time.time())
        for handle in handles:
            self._stopped.pop(handle.task.series_id, None)

    def watch(self) -> None:
        """Wait until a task ends or the journals are due for reading. Raises DiskFull."""
        deadline = time.monotonic() + LOOK_SECONDS
        while True:
            ended = self.take_back()
            for handle, state in ended.items():
                since = self._since[handle.task.series_id]
                if state is JobState.OUT_OF_MEMORY and begin_smaller(
                    handle.task, self.control, since, KILLED, alone=not self._is_shared
                ):
                    continue
                if state not in {JobState.BUSY, JobState.PREEMPTED}:
                    self._count_loss(handle)
            if ended or time.monotonic() >= deadline:
                return
            time.sleep(POLL_SECONDS)

    def take_back(self) -> Mapping[Handle, JobState]:
        """Stop supervising the tasks that are over; returns the state in which each ended.

        Raises DiskFull if a worker found the disk full: no other task could save either.
        """
        views = self.backend.views(list(self._open.values()))
        states = {handle: views[handle.job_id].state for handle in self._open.values()}
        over = {handle: state for handle, state in states.items() if state not in LIVE}
        self._is_shared = sum(state is not JobState.QUEUED for state in states.values()) > 1
        for handle, state in over.items():
            series_id = handle.task.series_id
            del self._open[series_id]
            if state in {JobState.LOST, JobState.OUT_OF_MEMORY, JobState.PREEMPTED}:
                self._stopped[series_id] = handle
            if state is JobState.NO_SPACE:
                raise DiskFull(handle.task.folder, is_read_only=is_read_only(handle.task.folder))
            if state is JobState.BUSY:
                self.leave([series_id])
            else:
                self.trained_at = time.monotonic()
        return over

    def _count_loss(self, handle: Handle) -> None:
        """Give up a Series whose workers ended several times in a row without any progress."""
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
        rank_logs = [task.folder / "logs" / f"rank-{rank}.log" for rank in range(task.ranks)]
        logs = [log for log in (*rank_logs, *self.backend.logs(handle)) if log.exists()]
        last = read_progress(task.folder)
        if last.kind is Kind.STALLED:
            endings = f"{last.stopped_by}; the stacks are in {' and '.join(map(str, logs))}"
        else:
            endings = "; ".join(map(describe_end, logs))
        del self._losses[task.series_id]  # a retry starts counting anew
        task.give_up(left, f"its worker ended {count} times at the same place; {endings}")


def begin_smaller(task: Task, control: Control, since: float, how: str, *, alone: bool = True) -> bool:
    """Have the next start of a Series whose worker was killed for memory take half the micro-batch.

    If there is no smaller one its unfinished Runs fail. Returns False if no worker has begun to train it since that
    time, or another process trains it. `how` says how the worker ended, and `alone` is False if other tasks were
    running. The host's memory tells nothing of what fits on a GPU.
    """
    progress = read_progress(task.folder)
    if not task.has_micro_batch:
        return False
    if not progress.is_open or progress.started is None or progress.started["t"] < round(since, 3):
        return False
    run, started = read_run(task.run_dirs[0]), progress.started
    layout, device = Layout.model_validate(started["layout"]), str(started.get("device", "cpu"))
    alone = alone and device == "cpu"
    remember(control.path.parent, run, layout, device, started.get("device_name"), alone=alone)
    said = f"{OUT_OF_MEMORY} with micro-batch {layout.micro_batch}: {how}"
    if layout.micro_batch == 1:
        remedy = what_would_fit(run, layout, on_cuda=device.startswith("cuda"))
        task.give_up(task.left(control), f"{said}; {remedy}")
        return True
    with untrained(task.folder) as is_free:
        if is_free:
            log.warning("series %s: %s; it begins again with a smaller one", task.series_id, said)
            Journal.open(task.folder).leave(Kind.OUT_OF_MEMORY, said)
        return is_free
