"""Submitting to a scheduler: everything that is missing is handed over once, and the command returns.

Two submissions at once, or one killed half-way and made again, hand every Series over exactly once: a Series is claimed
before the array that holds it is submitted, and a claim is free again only when its job has ended or is known never
to have existed.
"""

from __future__ import annotations

import getpass
import time
from collections.abc import Sequence
from dataclasses import dataclass

from harness.dispatch.base import Job
from harness.dispatch.ledger import jobs_of_runs, open_book
from harness.dispatch.ray.job_server import stop_ray_job
from harness.dispatch.slurm.queue import call
from harness.dispatch.slurm.sbatch import SlurmDispatcher, cancel_jobs, new_name, split_arrays
from harness.dispatch.slurm.snapshot import check_copying, copy_code
from harness.plan.allocation import Allocation, choose_allocation, share_out
from harness.plan.cluster import Profile
from harness.plan.plan import Plan, PlannedRun
from harness.record.control import Control
from harness.record.jobs import JobState
from harness.record.registry import ResolvedStudy
from harness.record.status import RunState, RunStatus
from harness.submit.claims import Claims
from harness.submit.submission import Submission
from ssmttm.errors import InputError

SAVING_SECONDS = 60.0
"""How long a job that has been told to end is waited for: SLURM itself ends it 30 s later, unless a site says more."""
LOOK_SECONDS = 2.0
"""Pause between two questions whether it has ended."""


@dataclass(frozen=True)
class Submitted:
    """What a submission did."""

    runs: int = 0
    series: int = 0
    arrays: tuple[str, ...] = ()
    """SLURM's numbers of the arrays submitted."""
    taken: int = 0
    """Series that another submission had claimed."""
    waiting: int = 0
    """Series for which the profile's limits.jobs leaves no room now."""
    allocation: Allocation | None = None
    """What one job was given to train all of them in, where they are packed."""
    is_packed: bool = False
    """Whether one job trains all of them."""


def submit_missing(
    submission: Submission,
    dispatcher: SlurmDispatcher,
    missing: Sequence[RunStatus],
    claims: Claims,
    cluster: str | None = None,
    on: str | None = None,
    nodes: int | None = None,
) -> Submitted:
    """Hand over the Series of these Runs that nobody has claimed, each in a job of its own.

    cluster: what the user called the profile; on, nodes: what he said with `--on` and `--nodes`.
    Raises SchedulerGone where SLURM does not answer.
    """
    jobs = submission.prepare(missing)
    numbers, runs, series, taken = [], 0, 0, 0
    room = room_for_jobs(dispatcher.profile, len(jobs))
    for shape, members in split_arrays(jobs, dispatcher.profile):
        array, wanted = new_name(), members[: room - series]
        ours = claims.take_all(submission.resolved.study.name, array, wanted)
        taken += len(wanted) - len(ours)
        if not ours:
            continue
        submission.launch(ours)
        number = dispatcher.submit_array(array, shape, ours)[0].job_id.split("_")[0]
        names = names_of(ours)
        tell_scheduled(submission, names, number, on, cluster=cluster, nodes=nodes)
        numbers.append(number)
        runs, series = runs + len(names), series + len(ours)
    return Submitted(runs, series, tuple(numbers), taken, len(jobs) - series - taken)


def submit_packed(
    submission: Submission,
    dispatcher: SlurmDispatcher,
    missing: Sequence[RunStatus],
    claims: Claims,
    cluster: str | None = None,
    on: str | None = None,
    nodes: int | None = None,
) -> Submitted:
    """Hand over the Series of these Runs that nobody has claimed, all in one job; on so many nodes where that is said.

    Raises SchedulerGone where SLURM does not answer, and what `choose_allocation` raises.
    """
    jobs = submission.prepare(missing)
    if jobs and not room_for_jobs(dispatcher.profile, 1):
        return Submitted(waiting=len(jobs))
    array = new_name()
    ours = claims.take_all(submission.resolved.study.name, array, jobs)
    if not ours:
        return Submitted(taken=len(jobs))
    names = names_of(ours)
    planned = {run.status.run_id: run for run in submission.plan.runs}
    allocation = choose_allocation([planned[name] for name in names], dispatcher.profile, nodes)
    dispatcher.hours = allocation.hours
    submission.launch(ours)
    handles = dispatcher.submit_array(array, allocation.shape, ours, packed=True, device=allocation.kind)
    number = handles[0].job_id.split("_")[0]
    tell_scheduled(submission, names, number, on, cluster=cluster, nodes=nodes)
    return Submitted(
        len(names), len(ours), (number,), len(jobs) - len(ours), allocation=allocation, is_packed=True
    )


def names_of(jobs: Sequence[Job]) -> list[str]:
    """The Runs of jobs."""
    return [folder.name for job in jobs for folder in job.run_dirs]


def tell_scheduled(
    submission: Submission,
    runs: list[str],
    job_id: str,
    on: str | None,
    **said: str | int | None,
) -> None:
    """Note in control.jsonl what a scheduler was given, and what the user said of where it is to go."""
    submission.control.append(
        "submitted",
        runs=runs,
        dispatcher=submission.name,
        on=on or submission.name,
        job_id=job_id,
        code=submission.code,
        **said,
    )


def room_for_jobs(profile: Profile, wanted: int) -> int:
    """How many of so many jobs this user may submit now; raises SchedulerGone."""
    if profile.limits.jobs is None:
        return wanted
    there = call("squeue", "--noheader", "--array", f"--user={getpass.getuser()}", "--format=%i")
    return max(0, min(wanted, profile.limits.jobs - len(there.split())))


def cancel_jobs_of(resolved: ResolvedStudy, rows: Sequence[RunStatus]) -> list[str]:
    """Take the study's jobs from SLURM or Ray of which no Run is wanted any more; returns their ids.

    A job some of whose Runs are still wanted goes on: its worker skips what was cancelled.
    """
    folder = resolved.root.study(resolved.study.name)
    if not (folder / "arrays").is_dir():
        return []
    over = {row.run_id for row in rows if row.state in {RunState.DONE, RunState.FAILED}}
    over |= Control(folder / "control.jsonl").cancelled()
    trained: dict[str, set[str]] = {}
    on_ray: dict[str, str] = {}
    for array, _, task, view in open_book(folder).elements():
        if view is not None and view.state in {JobState.QUEUED, JobState.RUNNING}:
            trained.setdefault(view.job_id, set()).update(run_dir.name for run_dir in task.run_dirs)
            if array.ray_address is not None:
                on_ray[view.job_id] = array.ray_address
    doomed = [job_id for job_id, runs in trained.items() if runs <= over]
    cancel_jobs([job_id for job_id in doomed if job_id not in on_ray])
    for job_id in doomed:
        if job_id in on_ray:
            stop_ray_job(on_ray[job_id], job_id)
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


def hours_for(missing: Sequence[PlannedRun], profile: Profile) -> float:
    """Time to ask for: the most that the longest Series may take and a quarter of an hour, within the limit."""
    by_series: dict[str, float] = {}
    for run in missing:
        by_series[run.status.series_id] = by_series.get(run.status.series_id, 0.0) + run.hours.high
    return min(profile.limits.hours, max(by_series.values(), default=0.0) + 0.25)


def submit_to_cluster(
    resolved: ResolvedStudy, plan: Plan, profile: Profile, cluster: str, on: str, nodes: int | None = None
) -> list[Submitted]:
    """Hand everything that is missing to SLURM, on a cluster that was checked; raises SchedulerGone.

    on: slurm has each Series in a job of its own, ray all in one, auto those in one that need less than a node. Where
    the profile wants it, jobs run from a copy of the code as it is now.
    """
    packed, apart = share_out(plan.missing, profile, on)
    folder, claims = resolved.root.study(resolved.study.name), Claims(resolved.root)
    done = []
    for runs, name in ((apart, "slurm"), (packed, "ray")):
        if not runs:
            continue
        dispatcher = SlurmDispatcher(profile, folder, hours_for(runs, profile))
        submission = Submission(resolved, plan, dispatcher, name)
        if profile.snapshot:
            dispatcher.copy = copy_code(folder, submission.code)
        rows = [run.status for run in runs]
        if name == "slurm":
            done.append(submit_missing(submission, dispatcher, rows, claims, cluster, on, nodes))
        else:
            done.append(submit_packed(submission, dispatcher, rows, claims, cluster, on, nodes))
    return done


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
