"""`ssmscale submit` and `retry`: having a study trained here or on a cluster, and the plan that both begin with."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from harness import submission, tables
from harness.cluster import this_machine
from harness.disk import DiskFull
from harness.foreground import train_here
from harness.opening import choose, jobs_of, open_study, registered, rows_of
from harness.options import (
    ClusterOption,
    RootOption,
    RunsArgument,
    SetOption,
    SnapshotOption,
    StudyArgument,
    YesOption,
)
from harness.plan import Plan, make_plan
from harness.plan_table import print_plan
from harness.profile import Profile, lasting_name, load_profile, profile_names
from harness.remote import check_cluster, last_submitted_to, submit_to_slurm, wait_for_ending_jobs
from harness.status import RunState
from harness.submission import ResolvedStudy
from harness.terminal import console, counted, errors
from ssmttm.errors import InputError


def planned(
    study: str, root: Path | None, changes: Sequence[str] | None, cluster: str | None
) -> tuple[ResolvedStudy, Plan]:
    """A study and what is left to train of it, here or on a cluster; trains nothing and fetches nothing."""
    resolved = open_study(study, root, changes, fetch=False)
    return resolved, plan_of(resolved, cluster)


def plan_of(resolved: ResolvedStudy, cluster: str | None) -> Plan:
    """What is left to train of a study, here or on a cluster."""
    return _plan(resolved, load_profile(cluster) if cluster else None)


def submit(
    study: StudyArgument,
    on: Annotated[
        str,
        typer.Option(
            "--on",
            metavar="local|slurm|auto",
            help="local trains here, in the foreground; slurm hands over and returns; auto takes slurm where a cluster "
            "is named.",
        ),
    ],
    root: RootOption = None,
    changes: SetOption = None,
    cluster: ClusterOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, show the plan, train nothing.")
    ] = False,
    yes: YesOption = False,
    snapshot: SnapshotOption = None,
) -> None:
    """Train what is missing of a study; what is finished is reused, what is interrupted goes on."""
    profile = profile_for(on, cluster, snapshot)
    resolved = open_study(study, root, changes)
    submission.check_before_training(resolved)
    made = _plan(resolved, profile)  # whatever is wrong with the resources is said before anything is written
    if profile is not None:
        check_cluster(profile, resolved)
    if dry_run:
        print_plan(console, made)
        return
    if profile is not None:
        confirm(made.totals()["gpu_hours"], profile, yes=yes)
    submission.register(resolved)
    submission.keep_plan(resolved.root, made)
    _hand_over(resolved, made, profile, cluster)


def retry(
    study: StudyArgument,
    runs: RunsArgument = None,
    root: RootOption = None,
    on: Annotated[
        str | None,
        typer.Option(
            "--on",
            metavar="local|slurm|auto",
            help="As for submit; where and with what cluster it last went.",
        ),
    ] = None,
    cluster: ClusterOption = None,
    snapshot: SnapshotOption = None,
) -> None:
    """Forget failures and cancellations, then submit what is missing."""
    resolved = registered(study, root)
    if cluster is None and on in {None, "slurm"}:
        last, cluster = last_submitted_to(resolved)
        if cluster is not None:
            console.print(f"on slurm, cluster {cluster}, as it was last submitted", markup=False)
        on = on or last
    profile = profile_for(on or "auto", cluster, snapshot)
    submission.check_before_training(resolved)
    if profile is not None:
        check_cluster(profile, resolved)
        if ending := wait_for_ending_jobs(resolved, choose(rows_of(resolved), runs)):
            errors.print(
                f"error: SLURM job {', '.join(ending)} still saves what it has trained; say the same again when it has "
                "ended",
                markup=False,
            )
            raise typer.Exit(1)
    concerned = submission.forgive(resolved.root, resolved.study.name, choose(rows_of(resolved), runs))
    console.print(f"{counted(len(concerned), 'run')} to be tried again")
    if concerned:
        _hand_over(resolved, _plan(resolved, profile), profile, cluster)


def profile_for(on: str, cluster: str | None, snapshot: bool | None) -> Profile | None:
    """The cluster a submission goes to; None for this machine."""
    if on not in {"local", "slurm", "auto"}:
        raise InputError(f"--on {on}: there is no such dispatcher; there are local, slurm and auto")
    if on == "local" or (on == "auto" and cluster is None):
        if snapshot:
            raise InputError("--snapshot: is for jobs that wait in a queue; here training begins at once")
        return None
    if cluster is None:
        raise InputError(
            f"--on slurm: name the cluster with --cluster; there are {', '.join(profile_names())}"
        )
    profile = load_profile(cluster)
    return profile if snapshot is None else profile.model_copy(update={"snapshot": snapshot})


def confirm(hours: float, profile: Profile, *, yes: bool) -> None:
    """Ask before much is spent; where nobody can answer, --yes has to be given."""
    if yes or hours <= profile.confirm_gpu_hours:
        return
    question = f"submit {hours:.4g} GPU-hours to {profile.name}"
    if not sys.stdin.isatty():
        raise InputError(
            f"{question}: more than its confirm_gpu_hours, {profile.confirm_gpu_hours:g}; say --yes"
        )
    typer.confirm(f"{question}?", abort=True)


def _hand_over(resolved: ResolvedStudy, made: Plan, profile: Profile | None, cluster: str | None) -> None:
    """Train here, or give what is missing to SLURM and say what was given."""
    if profile is None or cluster is None:
        _train(resolved, made)
        return
    done = submit_to_slurm(resolved, made, profile, lasting_name(cluster))
    name = resolved.study.name
    if done.waiting:
        errors.print(
            f"warning: {counted(done.waiting, 'series')} not submitted: {profile.name} takes {profile.limits.jobs} "
            "jobs of yours at once (limits.jobs); the same command submits them when some have ended",
            markup=False,
        )
    if done.arrays:
        console.print(
            f"{counted(done.runs, 'run')} in {counted(done.series, 'series')} submitted to {profile.name}: "
            f"SLURM jobs {', '.join(done.arrays)}"
        )
    elif not done.waiting and not done.taken:
        console.print(f"nothing of {name} is left to submit")
    if done.taken:
        console.print(f"{counted(done.taken, 'series')} left to another submission")
    place = resolved.root.path
    usual = {Path("runs"), Path(os.environ.get("SSMSCALE_ROOT", "runs"))}
    root = "" if place in usual else f" --root {shlex.quote(str(place))}"
    console.print(f"`ssmscale status {name}{root} --watch` shows how they do", markup=False)


def _plan(resolved: ResolvedStudy, profile: Profile | None = None) -> Plan:
    cluster = this_machine() if profile is None else profile.cluster()
    try:
        return make_plan(
            resolved.study, resolved.points, resolved.corpus, resolved.root, cluster, jobs_of(resolved)
        )
    except InputError as error:
        raise InputError(f"{resolved.where}: {error}") from error


def _train(resolved: ResolvedStudy, made: Plan) -> None:
    """Train what is missing, say what a study is left with, and end with 1 where a Run failed."""
    try:
        rows = train_here(resolved, made)
    except DiskFull as full:
        prune = f" (`ssmscale prune {resolved.study.name}` drops checkpoints no run needs)"
        remedy = full.remedy if full.is_read_only else full.remedy + prune
        errors.print(f"error: {full}; {remedy}, then the same command goes on from here", markup=False)
        raise typer.Exit(1) from full
    tables.print_summary(console, resolved.study.name, rows)
    if any(row.state is RunState.FAILED for row in rows):
        raise typer.Exit(1)
