"""Where trials are trained: the dispatchers of `submit`, fed a trial at a time while others run.

Both leave what is finished or in other hands alone, and both find again what an earlier controller left running: here
by the journals, on a cluster by SLURM's word and the claims on Series.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from harness.common.console import warn
from harness.common.disk import DiskFull, is_read_only
from harness.common.process import identify_process
from harness.dispatch.base import Dispatcher, Handle
from harness.dispatch.ledger import jobs_of_runs, open_book
from harness.dispatch.slurm.sbatch import SlurmDispatcher
from harness.dispatch.slurm.snapshot import copy_code
from harness.dispatch.supervise import BUSY_SECONDS
from harness.plan.cluster import Cluster, Profile, this_machine
from harness.record.jobs import JobState, JobView, SchedulerGone
from harness.record.registry import ResolvedStudy
from harness.record.root import Root
from harness.record.status import RunState, RunStatus, StatusReader
from harness.study.grid import GridPoint
from harness.study.schema import Study
from harness.submit.claims import Claims
from harness.submit.local import dispatcher_here
from harness.submit.slurm import cancel_jobs_of, hours_for, submit_missing
from harness.submit.submission import Submission

ASK_SECONDS = 5.0
"""Between two questions to SLURM: a controller may watch for days."""
AT_ONCE_ON_SLURM = 8
"""Trials in SLURM's hands at once where neither study nor profile says: with more, a search is blind to its own."""


class Workplace(Protocol):
    """Trains Runs and tells where they stand."""

    name: str
    cluster: Cluster
    pause: float
    """Seconds between two looks."""

    @property
    def dispatcher(self) -> Dispatcher:
        """What hands Runs over."""

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


class Here:
    """This machine, `on` workers of its own or a Ray's; they stay warm from one trial to the next."""

    pause = 0.1

    def __init__(self, root: Root, study: Study, on: str) -> None:
        self.name = on
        self.cluster = this_machine()
        self.threads, self.jobs = study.resources.threads or 1, study.resources.jobs
        self._stack = contextlib.ExitStack()
        self.dispatcher = self._stack.enter_context(dispatcher_here(on, study, root))
        self.reader = StatusReader(root, study.name)
        self.root, self.process = root, identify_process()
        self._handles: dict[str, Handle] = {}
        self._busy: dict[str, float] = {}
        """Series that another process held when they were last handed over, and when to try again (monotonic)."""

    def room(self, series: int) -> int:
        """As many trials as keep the workers busy."""
        workers = self.jobs or self.cluster.gpus or max(1, self.cluster.cores // self.threads)
        return max(1, -(-workers // series))

    def train(self, submission: Submission, missing: Sequence[RunStatus]) -> bool:
        """Queue Runs behind those of other trials."""
        jobs = submission.leave_claimed(submission.prepare(missing))
        self._busy |= dict.fromkeys(submission.left, time.monotonic() + BUSY_SECONDS)
        submission.launch(jobs)
        submission.tell_submitted([folder.name for job in jobs for folder in job.run_dirs])
        for handle in self.dispatcher.submit(jobs):
            self._handles[handle.job.series_id] = handle
        return not any(row.series_id in self._busy for row in missing)

    def cancel(self, resolved: ResolvedStudy, rows: Sequence[RunStatus]) -> None:
        """Nothing: workers read control.jsonl at each step, leave the Run and stay warm for the next."""

    def look(self, points: Sequence[GridPoint]) -> list[RunStatus]:
        """Take up what workers said and read the journals."""
        states = self.dispatcher.poll(list(self._handles.values()))
        for handle, state in states.items():
            if state is JobState.NO_SPACE:
                folder = self.root.series(handle.job.series_id)
                raise DiskFull(folder, is_read_only=is_read_only(folder))
            if state not in {JobState.QUEUED, JobState.RUNNING}:
                del self._handles[handle.job.series_id]
            if state is JobState.BUSY:
                self._busy[handle.job.series_id] = time.monotonic() + BUSY_SECONDS
        # What a worker was just told of has written nothing yet.
        now = time.monotonic()
        waiting = {*self._handles, *(series for series, until in self._busy.items() if now < until)}
        return [
            replace(row, state=RunState.QUEUED)
            if row.series_id in waiting and row.state in {RunState.NEW, RunState.INTERRUPTED}
            else row
            for row in self.reader.read(points, submitter=self.process)
        ]

    def close(self) -> None:
        """Have the workers save and go, and what was started for them."""
        self.dispatcher.close()
        self._stack.close()


class OnSlurm:
    """A cluster: jobs outlive this process, and the next one finds them."""

    name = "slurm"
    pause = 1.0

    def __init__(self, root: Root, study: Study, profile: Profile, called: str) -> None:
        self.cluster, self.profile, self.called = profile.cluster(), profile, called
        self.folder = root.study(study.name)
        self.dispatcher = SlurmDispatcher(profile, self.folder)
        self.root, self.reader = root, StatusReader(root, study.name)
        self._jobs: Mapping[str, JobView] = {}
        self._asked = self._refused = float("-inf")
        """When SLURM was last asked, and when there was last no room (monotonic)."""
        self._problem: str | None = None
        """What SLURM last failed at, told once."""

    def room(self, series: int) -> int:
        """What the profile says may run at once."""
        return max(1, (self.profile.limits.parallel or AT_ONCE_ON_SLURM) // series)

    def train(self, submission: Submission, missing: Sequence[RunStatus]) -> bool:
        """Claim the Series and submit an array for them.

        SLURM that has taken trials of this search before is waited for; else it raises SchedulerGone.
        """
        if time.monotonic() - self._refused < ASK_SECONDS:
            return False
        planned = [
            run for run in submission.plan.runs if run.status.run_id in {row.run_id for row in missing}
        ]
        if self.profile.snapshot and self.dispatcher.copy is None:
            self.dispatcher.copy = copy_code(self.folder, submission.code)
        self.dispatcher.hours = hours_for(planned, self.profile)
        self._asked = float("-inf")
        try:
            done = submit_missing(submission, self.dispatcher, missing, Claims(self.root), self.called)
        except SchedulerGone as gone:
            if all(array.job_id is None for array in self.dispatcher.book.read().values()):
                raise
            self._warn(gone, "submitting again until it takes it")
            self._refused = time.monotonic()
            return False
        self._problem = None
        if not done.series:
            self._refused = time.monotonic()
        return bool(done.series)

    def cancel(self, resolved: ResolvedStudy, rows: Sequence[RunStatus]) -> None:
        """Take jobs out of the queue, and end those that run, of which no Run is wanted any more."""
        with contextlib.suppress(SchedulerGone):  # their workers leave by themselves
            cancel_jobs_of(resolved, rows)

    def look(self, points: Sequence[GridPoint]) -> list[RunStatus]:
        """Read the journals and, every few seconds, ask SLURM."""
        if time.monotonic() - self._asked > ASK_SECONDS:
            self._ask()
        return self.reader.read(points, jobs=self._jobs)

    def _ask(self) -> None:
        self._asked = time.monotonic()
        try:
            self._jobs = jobs_of_runs(open_book(self.folder))
        except SchedulerGone as gone:
            self._warn(gone, "going on with what it last said")

    def _warn(self, gone: SchedulerGone, what_now: str) -> None:
        if self._problem != str(gone):
            warn(f"{gone}; {what_now}")
            self._problem = str(gone)

    def close(self) -> None:
        """Nothing to let go of: the jobs are SLURM's."""
