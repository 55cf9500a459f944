"""Submitting to a scheduler: everything that is missing is handed over once, and the command returns.

Two submissions at once, or one killed half-way and made again, hand every Series over exactly once: a Series is claimed
before the array that holds it is submitted, and a claim is free again only when its job has ended or is known never
to have existed.
"""

from __future__ import annotations

import getpass
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from threading import Lock

from harness.claims import Claim, drop_claim, make_claim, read_claim
from harness.code_copy import check_copying, copy_code
from harness.control import Control
from harness.dispatch.base import JobState
from harness.dispatch.slurm import (
    Book,
    SlurmDispatcher,
    cancel_jobs,
    is_given_up,
    jobs_of_runs,
    new_name,
    open_book,
    split_arrays,
)
from harness.dispatch.slurm_queue import call
from harness.plan import Plan, PlannedRun
from harness.process import identify_process
from harness.profile import Profile
from harness.rundir import Root
from harness.side_by_side import DISK_THREADS, side_by_side
from harness.status import RunState, RunStatus
from harness.submission import ResolvedStudy, Submission
from ssmttm.errors import InputError

SAVING_SECONDS = 60.0
"""How long a job that has been told to end is waited for: SLURM itself ends it 30 s later, unless a site says more."""
LOOK_SECONDS = 2.0
"""Pause between two questions whether it has ended."""


@dataclass(frozen=True)
class Submitted:
    """What a submission did."""

    runs: int
    series: int
    arrays: tuple[str, ...]
    """SLURM's numbers of the arrays submitted."""
    taken: int
    """Series that another submission had claimed."""
    waiting: int = 0
    """Series for which the profile's limits.jobs leaves no room now."""


@dataclass
class Claims:
    """The claims on a ROOT's Series, judged by what SLURM says of the arrays they were made for."""

    root: Root
    books: dict[str, Book] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)
    judged: set[str] = field(default_factory=set)
    """Arrays for whose sake a study's Book was read again."""

    def take(self, series_id: str, claim: Claim) -> bool:
        """Claim a Series, in place of a claim that is over; False where somebody else has it."""
        folder = self.root.series(series_id)
        held = read_claim(folder)
        if held is not None:
            if self._holds(held, series_id):
                return False
            drop_claim(folder, held)
        return make_claim(folder, claim)

    def _holds(self, claim: Claim, series_id: str) -> bool:
        if not claim.study:
            return False
        if claim.array in (book := self._book(claim.study)).arrays:
            return book.holds(claim.array, series_id)
        if is_in_hand(claim):
            return True
        # Whoever is gone now may have claimed, submitted and ended since the Book was read.
        return self._book_after(claim).holds(claim.array, series_id)

    def _book(self, study_name: str) -> Book:
        with self.lock:  # Series are claimed side by side, and SLURM is asked once
            if study_name not in self.books:
                self.books[study_name] = open_book(self.root.study(study_name))
            return self.books[study_name]

    def _book_after(self, claim: Claim) -> Book:
        """The Book of a study, read after the submission that made a claim was gone; once for each array."""
        with self.lock:
            if claim.array not in self.judged:
                self.books[claim.study] = open_book(self.root.study(claim.study))
                self.judged.add(claim.array)
            return self.books[claim.study]


def submit_missing(
    submission: Submission,
    dispatcher: SlurmDispatcher,
    missing: Sequence[RunStatus],
    claims: Claims,
    cluster: str | None = None,
) -> Submitted:
    """Hand over the Series of these Runs that nobody has claimed; `cluster` is what the user called the profile.

    Raises SchedulerGone where SLURM does not answer.
    """
    name = submission.resolved.study.name
    jobs = submission.prepare(missing)
    numbers, runs, series, taken = [], 0, 0, 0
    room = room_for_jobs(dispatcher.profile, len(jobs))
    for shape, members in split_arrays(jobs, dispatcher.profile):
        array = new_name()
        claim = Claim(study=name, array=array, process=identify_process(), t=time.time())
        wanted = members[: room - series]
        taking = side_by_side(
            partial(claims.take, claim=claim), [job.series_id for job in wanted], DISK_THREADS
        )
        ours = [job for job, is_ours in zip(wanted, taking, strict=True) if is_ours]
        taken += len(wanted) - len(ours)
        if not ours:
            continue
        submission.launch(ours)
        handles = dispatcher.submit_array(array, shape, ours)
        number = handles[0].job_id.split("_")[0]
        names = [folder.name for job in ours for folder in job.run_dirs]
        submission.control.append(
            "submitted",
            runs=names,
            dispatcher="slurm",
            cluster=cluster,
            job_id=number,
            code=submission.code,
        )
        numbers.append(number)
        runs, series = runs + len(names), series + len(ours)
    return Submitted(runs, series, tuple(numbers), taken, len(jobs) - series - taken)


def room_for_jobs(profile: Profile, wanted: int) -> int:
    """How many of so many jobs this user may submit now; raises SchedulerGone."""
    if profile.limits.jobs is None:
        return wanted
    there = call("squeue", "--noheader", "--array", f"--user={getpass.getuser()}", "--format=%i")
    return max(0, min(wanted, profile.limits.jobs - len(there.split())))


def cancel_jobs_of(resolved: ResolvedStudy, rows: Sequence[RunStatus]) -> list[str]:
    """scancel the study's jobs of which no Run is wanted any more; returns their ids.

    A job some of whose Runs are still wanted goes on: its worker skips what was cancelled.
    """
    folder = resolved.root.study(resolved.study.name)
    if not (folder / "arrays").is_dir():
        return []
    over = {row.run_id for row in rows if row.state in {RunState.DONE, RunState.FAILED}}
    over |= Control(folder / "control.jsonl").cancelled()
    doomed = [
        view.job_id
        for _, _, task, view in open_book(folder).elements()
        if view is not None
        and view.state in {JobState.QUEUED, JobState.RUNNING}
        and {run_dir.name for run_dir in task.run_dirs} <= over
    ]
    cancel_jobs(doomed)
    return doomed


def wait_for_ending_jobs(resolved: ResolvedStudy, rows: Sequence[RunStatus]) -> list[str]:
    """Wait for jobs that still save what these Runs were cancelled with; returns the ids of those that still do.

    Until such a job has ended its Series is taken, and it trains nothing more. Raises SchedulerGone.
    """
    folder = resolved.root.study(resolved.study.name)
    cancelled = Control(folder / "control.jsonl").cancelled()
    given_up = {row.run_id for row in rows if row.state is RunState.FAILED or row.run_id in cancelled}
    deadline = time.monotonic() + SAVING_SECONDS
    while True:
        jobs = jobs_of_runs(open_book(folder)) if given_up else {}
        ending = {
            view.job_id for run, view in jobs.items() if run in given_up and view.slurm_state == "COMPLETING"
        }
        if not ending or time.monotonic() >= deadline:
            return sorted(ending)
        time.sleep(LOOK_SECONDS)


def last_submitted_to(resolved: ResolvedStudy) -> tuple[str, str | None]:
    """Dispatcher and cluster of the study's newest submission; local where there was none."""
    control = Control(resolved.root.study(resolved.study.name) / "control.jsonl")
    for event in reversed(control.read()):
        if event["event"] == "submitted":
            cluster = event.get("cluster")
            return event.get("dispatcher", "local"), cluster if isinstance(cluster, str) else None
    return "local", None


def hours_for(missing: Sequence[PlannedRun], profile: Profile) -> float:
    """Time to ask for: the most that the longest Series may take and a quarter of an hour, within the limit."""
    by_series: dict[str, float] = {}
    for run in missing:
        by_series[run.status.series_id] = by_series.get(run.status.series_id, 0.0) + run.hours.high
    return min(profile.limits.hours, max(by_series.values(), default=0.0) + 0.25)


def is_in_hand(claim: Claim) -> bool:
    """Whether a claim without an array may belong to a submission that is about to write it."""
    return not is_given_up(claim.process, claim.t)


def submit_to_slurm(resolved: ResolvedStudy, plan: Plan, profile: Profile, cluster: str) -> Submitted:
    """Hand everything that is missing to SLURM, on a cluster that was checked; raises SchedulerGone.

    Where the profile wants it, the jobs run from a copy of the code as it is now.
    """
    folder = resolved.root.study(resolved.study.name)
    dispatcher = SlurmDispatcher(profile, folder, hours_for(plan.missing, profile))
    submission = Submission(resolved, plan, dispatcher, "slurm")
    if profile.snapshot and plan.missing:
        dispatcher.copy = copy_code(folder, submission.code)
    rows = [run.status for run in plan.missing]
    return submit_missing(submission, dispatcher, rows, Claims(resolved.root), cluster)


def check_cluster(profile: Profile, resolved: ResolvedStudy) -> None:
    """Raise InputError where a profile names a partition SLURM has not, or nodes cannot see ROOT or the corpus.

    Also where the code is to be copied and cannot be.
    """
    profile.check_shared("--root", resolved.root.path)
    profile.check_shared("corpus.path", resolved.study.corpus.path)
    if profile.snapshot:
        check_copying(resolved.root.study(resolved.study.name))
    known = set(call("sinfo", "--noheader", "--format=%R").split())
    for name in profile.partitions:
        if name not in known:
            raise InputError(
                f"--cluster {profile.name}: partitions: {name}: SLURM here has {', '.join(sorted(known))}"
            )
