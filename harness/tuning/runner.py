"""Where trials are trained: the backends of `submit`, handed a trial at a time while others run.

Both kinds leave what is finished or in other hands alone, and both find again what an earlier controller left running:
where this process supervises by the journals, else by the scheduler's word and the leases on Series.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from harness.common.console import warn
from harness.common.process import identify_process
from harness.dispatch.arrays import ArrayStore
from harness.dispatch.base import Backend
from harness.dispatch.ledger import jobs_of_runs, open_ledger
from harness.dispatch.supervise import JobSupervisor
from harness.plan.cluster import Cluster
from harness.record.control import Control
from harness.record.jobs import JobView, SchedulerUnavailable
from harness.record.registry import ResolvedStudy
from harness.record.status import RunState, RunStatus, StatusReader
from harness.study.grid import GridPoint
from harness.submit.cancel import cancel_jobs_of
from harness.submit.submission import Submission

ASK_SECONDS = 5.0
"""Between two questions to a scheduler: a controller may watch for days."""
AT_ONCE = 8
"""Trials with a scheduler at once where neither study nor profile says: with more, a search is blind to its own."""


class TrialRunner(Protocol):
    """Trains Runs and tells where they stand."""

    backend: Backend
    cluster: Cluster
    pause: float
    """Seconds between two looks."""

    def room(self, series: int) -> int:
        """How many trials of so many Series are worth training at once."""

    def train(self, submission: Submission, missing: Sequence[RunStatus]) -> bool:
        """Hand Runs over that nobody trains; False where others have them, or there is no room now."""

    def cancel(self, resolved: ResolvedStudy, rows: Sequence[RunStatus]) -> None:
        """End what trains Runs that control.jsonl says are cancelled."""

    def look(self, points: Sequence[GridPoint]) -> list[RunStatus]:
        """Where these Runs stand; raises DiskFull where no room is left to go on."""

    def close(self) -> None:
        """End what would not outlive this process, saving what it has."""


def open_runner(backend: Backend, resolved: ResolvedStudy) -> TrialRunner:
    """Return the runner of a search whose trials a backend trains; `resolved` is any of them."""
    return (Scheduled if backend.outlives else Supervised)(backend, resolved)


class Supervised:
    """A backend of this process, whose workers stay warm from one trial to the next."""

    pause = 0.1

    def __init__(self, backend: Backend, resolved: ResolvedStudy) -> None:
        study, root = resolved.study, resolved.root
        self.backend = backend.__enter__()
        self.cluster = backend.offer(resolved)
        self.threads, self.jobs = study.resources.threads or 1, study.resources.jobs
        self.reader, self.process = StatusReader(root, study.name), identify_process()
        self._supervisor = JobSupervisor(Control(root.study(study.name) / "control.jsonl"), backend)

    def room(self, series: int) -> int:
        """As many trials as keep the workers busy."""
        workers = self.jobs or self.cluster.gpus or max(1, self.cluster.cores // self.threads)
        return max(1, -(-workers // series))

    def train(self, submission: Submission, missing: Sequence[RunStatus]) -> bool:
        """Queue Runs behind those of other trials."""
        self._supervisor.watch_over(submission.hand_over(missing).handles)
        self._supervisor.leave(submission.left)
        return not any(self._supervisor.is_busy(row.series_id) for row in missing)

    def cancel(self, resolved: ResolvedStudy, rows: Sequence[RunStatus]) -> None:
        """Nothing: workers read control.jsonl at each step, leave the Run and stay warm for the next."""

    def look(self, points: Sequence[GridPoint]) -> list[RunStatus]:
        """Take up what workers said and read the journals."""
        self._supervisor.take_back()
        # What a worker was just told of has written nothing yet.
        return [
            replace(row, state=RunState.QUEUED)
            if row.state in {RunState.NEW, RunState.INTERRUPTED} and not self._supervisor.takes(row.series_id)
            else row
            for row in self.reader.read(points, submitter=self.process)
        ]

    def close(self) -> None:
        """Have the workers save and go, and what was started for them."""
        self.backend.close()


class Scheduled:
    """A backend whose jobs outlive this process; the next one finds them."""

    pause = 1.0

    def __init__(self, backend: Backend, resolved: ResolvedStudy) -> None:
        self.backend = backend.__enter__()
        self.cluster, self.root = backend.offer(resolved), resolved.root
        self.folder = resolved.root.study(resolved.study.name)
        self.reader = StatusReader(resolved.root, resolved.study.name)
        self._jobs: Mapping[str, JobView] = {}
        self._asked = self._refused = float("-inf")
        """When the scheduler was last asked, and when there was last no room (monotonic)."""
        self._problem: str | None = None
        """What the scheduler last failed at, told once."""

    def room(self, series: int) -> int:
        """What the profile says may run at once."""
        profile = self.backend.target.profile
        return max(1, ((profile and profile.limits.parallel) or AT_ONCE) // series)

    def train(self, submission: Submission, missing: Sequence[RunStatus]) -> bool:
        """Lease the Series and submit a batch for them.

        A scheduler that has taken trials of this search before is waited for; else it raises SchedulerUnavailable.
        """
        if time.monotonic() - self._refused < ASK_SECONDS:
            return False
        self._asked = float("-inf")
        try:
            handles = submission.hand_over(missing).handles
        except SchedulerUnavailable as gone:
            if all(array.job_id is None for array in ArrayStore(self.folder).read().values()):
                raise
            self._warn(gone, "submitting again until it takes it")
            self._refused = time.monotonic()
            return False
        self._problem = None
        if not handles:
            self._refused = time.monotonic()
        return bool(handles)

    def cancel(self, resolved: ResolvedStudy, rows: Sequence[RunStatus]) -> None:
        """Take jobs out of the queue, and end those that run, of which no Run is wanted any more."""
        with contextlib.suppress(SchedulerUnavailable):  # their workers leave by themselves
            cancel_jobs_of(resolved, rows)

    def look(self, points: Sequence[GridPoint]) -> list[RunStatus]:
        """Read the journals and, every few seconds, ask the scheduler."""
        if time.monotonic() - self._asked > ASK_SECONDS:
            self._ask()
        return self.reader.read(points, jobs=self._jobs)

    def _ask(self) -> None:
        self._asked = time.monotonic()
        try:
            self._jobs = jobs_of_runs(open_ledger(self.folder))
        except SchedulerUnavailable as gone:
            self._warn(gone, "going on with what it last said")

    def _warn(self, gone: SchedulerUnavailable, what_now: str) -> None:
        if self._problem != str(gone):
            warn(f"{gone}; {what_now}")
            self._problem = str(gone)

    def close(self) -> None:
        """Nothing to let go of: the jobs are the scheduler's."""
