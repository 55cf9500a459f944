"""Runners of trials: they submit a trial at a time to a backend of `submit`, while other trials run.

Both kinds leave Runs alone that are finished or trained by another process, and both find the Runs that an earlier
controller left running: a supervised backend by the journals, any other by the scheduler and the leases on Series.
"""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace

from harness.common.console import warn
from harness.common.format import hint
from harness.common.process import identify_process
from harness.dispatch.arrays import ArrayStore
from harness.dispatch.base import Backend
from harness.dispatch.ledger import jobs_of_runs, open_with_joined
from harness.dispatch.supervise import JobSupervisor
from harness.plan.cluster import ranks_a_node
from harness.record.jobs import JobView, SchedulerUnavailable
from harness.record.registry import ResolvedStudy
from harness.record.status import RunState, RunStatus, StatusReader
from harness.study.grid import GridPoint
from harness.submit.cancel import cancel_jobs_of
from harness.submit.submission import Submission

ASK_SECONDS = 5.0
"""Seconds between two calls of a scheduler: a controller may run for days."""
AT_ONCE = 8
"""Trials at once where neither study nor profile gives a number; with more, a search learns too little from each."""


class TrialRunner(ABC):
    """Trains Runs and reads their states."""

    pause: float
    """Seconds between two calls of `look`."""
    stopping = "stopping: workers save what they have"
    """Text to print after Ctrl-C, before `close`."""
    is_crowded = False
    """True if it may train more trials at once than a search learns from."""

    def __init__(self, backend: Backend, resolved: ResolvedStudy) -> None:
        """Open a backend for a search, of which `resolved` is any trial."""
        self.backend = backend.__enter__()
        self.cluster = backend.offer(resolved.places)
        self.reader = StatusReader(resolved.root, resolved.study.name)

    @abstractmethod
    def capacity(self, series: int) -> int:
        """Return the number of trials, of so many Series each, to train at once."""

    @abstractmethod
    def train(self, submission: Submission, missing: Sequence[RunStatus]) -> bool:
        """Submit Runs that no process trains; False if another process trains them or no job may be submitted now."""

    @abstractmethod
    def look(self, points: Sequence[GridPoint]) -> list[RunStatus]:
        """Return the states of these Runs; raises DiskFull where the disk has no space left."""

    @abstractmethod
    def cancel(self, resolved: ResolvedStudy, rows: Sequence[RunStatus]) -> None:
        """End the jobs of Runs that control.jsonl lists as cancelled."""

    def close(self) -> None:
        """End the jobs that would not outlive this process; they save first."""
        self.backend.close()


def open_runner(backend: Backend, resolved: ResolvedStudy) -> TrialRunner:
    """Return the runner of a search on a backend."""
    return (Scheduled if backend.outlives else Supervised)(backend, resolved)


class Supervised(TrialRunner):
    """A backend of this process, whose workers stay warm from one trial to the next."""

    pause = 0.1

    def __init__(self, backend: Backend, resolved: ResolvedStudy) -> None:
        super().__init__(backend, resolved)
        self.resources, self.process = resolved.study.resources, identify_process()
        self._supervisor = JobSupervisor(resolved.root.control(resolved.study.name), backend)

    def capacity(self, series: int) -> int:
        """Return the fewest trials that keep all workers busy."""
        workers = self.resources.jobs or ranks_a_node(self.cluster, self.resources.threads or 1)
        return max(1, -(-workers // series))

    def train(self, submission: Submission, missing: Sequence[RunStatus]) -> bool:
        """Queue Runs behind those of other trials."""
        self._supervisor.watch_over(submission.hand_over(missing).handles)
        self._supervisor.leave(submission.left)
        return not any(self._supervisor.is_busy(row.series_id) for row in missing)

    def cancel(self, resolved: ResolvedStudy, rows: Sequence[RunStatus]) -> None:
        """Do nothing: workers read control.jsonl at each step, leave the Run and stay warm for the next."""

    def look(self, points: Sequence[GridPoint]) -> list[RunStatus]:
        """Take back ended tasks and read the journals."""
        self._supervisor.take_back()
        # The journal of a Run that was just submitted is still empty.
        return [
            replace(row, state=RunState.QUEUED)
            if row.state in {RunState.NEW, RunState.INTERRUPTED} and not self._supervisor.takes(row.series_id)
            else row
            for row in self.reader.read(points, submitter=self.process)
        ]


class Scheduled(TrialRunner):
    """A backend whose jobs outlive this process; the next controller finds them."""

    pause = 1.0
    is_crowded = True

    def __init__(self, backend: Backend, resolved: ResolvedStudy) -> None:
        super().__init__(backend, resolved)
        self.root, self.name = resolved.root, resolved.study.name
        status, logs, cancel = (
            hint(*words, root=self.root.path)
            for words in (("status", self.name), ("logs", self.name, "RUN"), ("cancel", self.name))
        )
        self.stopping = (
            f"stopping the search; its jobs in {backend.scheduler} go on: {status} shows them, {logs} prints their "
            f"logs, {cancel} ends them"
        )
        self.folder = self.root.study(self.name)
        self._jobs: Mapping[str, JobView] = {}
        self._asked = self._refused = float("-inf")
        """Monotonic times when the scheduler was last asked, and when it last took no more jobs."""
        self._problem: str | None = None
        """Last failure of the scheduler, for which one warning is enough."""

    def capacity(self, series: int) -> int:
        """Return the number of trials that the profile lets run at once."""
        profile = self.backend.target.profile
        return max(1, ((profile and profile.limits.parallel) or AT_ONCE) // series)

    def train(self, submission: Submission, missing: Sequence[RunStatus]) -> bool:
        """Lease the Series and submit a batch for them.

        Raises SchedulerUnavailable unless the scheduler has taken jobs of this search before: then it waits.
        """
        if time.monotonic() - self._refused < ASK_SECONDS:
            return False
        self._asked = float("-inf")
        try:
            handles = submission.hand_over(missing).handles
        except SchedulerUnavailable as gone:
            if all(array.job_id is None for array in ArrayStore(self.folder).read().values()):
                raise
            self._warn(gone, "the submission is repeated until it succeeds")
            self._refused = time.monotonic()
            return False
        self._problem = None
        if not handles:
            self._refused = time.monotonic()
        return bool(handles)

    def cancel(self, resolved: ResolvedStudy, rows: Sequence[RunStatus]) -> None:
        """Cancel the jobs, queued or running, that have no Run left to train."""
        with contextlib.suppress(SchedulerUnavailable):  # their workers leave by themselves
            cancel_jobs_of(resolved, rows)

    def look(self, points: Sequence[GridPoint]) -> list[RunStatus]:
        """Read the journals and, every few seconds, ask the scheduler."""
        if time.monotonic() - self._asked > ASK_SECONDS:
            self._asked = time.monotonic()
            try:
                self._jobs = jobs_of_runs(open_with_joined(self.root, self.name))
            except SchedulerUnavailable as gone:
                self._warn(gone, "its last answer holds")
        return self.reader.read(points, jobs=self._jobs)

    def _warn(self, gone: SchedulerUnavailable, what_now: str) -> None:
        if self._problem != str(gone):
            warn(f"{gone}; {what_now}")
            self._problem = str(gone)
