"""`ssmscale submit` and `retry`: having a study trained here or on a cluster, and the plan that both begin with."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from harness.cli.display import StudyProgress, print_summary
from harness.cli.options import (
    ClusterOption,
    NodesOption,
    RayAddressOption,
    RootOption,
    RunsArgument,
    SetOption,
    SnapshotOption,
    StudyArgument,
    YesOption,
    cluster_said,
)
from harness.cli.plan import print_plan
from harness.common.console import console, errors
from harness.common.disk import DiskFull
from harness.common.format import counted
from harness.dispatch.base import Backend, SubmitTarget
from harness.plan.cluster import CONFIRM_GPU_HOURS, load_profile
from harness.plan.plan import Plan
from harness.record.jobs import LIVE, JobView
from harness.record.registry import ResolvedStudy, check_before_training, open_study, register, registered
from harness.record.status import RunState, RunStatus
from harness.submit.cancel import reset_attempts, wait_for_ending_jobs
from harness.submit.foreground import train_here
from harness.submit.monitor import choose, jobs_of, plan_for, rows_of
from harness.submit.submission import HandedOver, hand_over, keep_plan
from harness.submit.target import Options, as_before, backends_of, last_options, target_of
from ssmttm.errors import InputError

GIVEN_UP = frozenset({RunState.FAILED, RunState.CANCELLED})
"""States out of which `retry` takes a Run."""


def submit(
    context: typer.Context,
    study: StudyArgument,
    on: Annotated[
        str,
        typer.Option(
            "--on",
            metavar="local|slurm|ray|auto",
            help="local trains here, in the foreground; slurm makes each series a job, hands over and returns; ray "
            "packs all on the GPUs of one job, or here on a Ray of its own where no cluster is named; auto packs what "
            "needs less than a node of the cluster and makes jobs of the rest, or trains here where none is named.",
        ),
    ],
    root: RootOption = None,
    changes: SetOption = None,
    cluster: ClusterOption = None,
    nodes: NodesOption = None,
    ray_address: RayAddressOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, show the plan, train nothing.")
    ] = False,
    yes: YesOption = False,
    snapshot: SnapshotOption = None,
) -> None:
    """Train what is missing of a study; what is finished is reused, what is interrupted goes on."""
    if ray_address is not None:
        cluster = cluster_said(context, cluster)
    there = target_of(on, cluster, snapshot, nodes, ray_address=ray_address or _ray_named(on, cluster))
    resolved = open_study(study, root, changes)
    check_before_training(resolved)
    backends = backends_of(there, resolved)
    backend = backends[0]
    # Everything that is wrong is said before anything is written.
    made = plan_for(resolved, backend.offer(resolved))
    shares = backend.describe(made.missing)
    backend.check(resolved)
    if dry_run:
        print_plan(console, made)
        for line in shares:
            console.print(line)
        return
    if backend.outlives:
        confirm(made.totals()["gpu_hours"], backend.where, backend.confirm_gpu_hours, yes=yes)
    register(resolved)
    keep_plan(resolved.root, made)
    _submit(resolved, made, backends)


def retry(
    context: typer.Context,
    study: StudyArgument,
    runs: RunsArgument = None,
    root: RootOption = None,
    on: Annotated[
        str | None,
        typer.Option(
            "--on",
            metavar="local|slurm|ray|auto",
            help="As for submit. Where this, --cluster, --nodes or --ray-address are not said, all is as it was last "
            "submitted, whatever SSMSCALE_CLUSTER says.",
        ),
    ] = None,
    cluster: ClusterOption = None,
    nodes: NodesOption = None,
    ray_address: RayAddressOption = None,
    snapshot: SnapshotOption = None,
) -> None:
    """Forget failures and cancellations, then submit what is missing."""
    resolved = registered(study, root, fetch=True)
    there = _as_before(
        resolved, Options(on, cluster_said(context, cluster), nodes, ray_address), cluster, snapshot
    )
    check_before_training(resolved)
    backends = backends_of(there, resolved)
    backend = backends[0]
    cluster_there = backend.offer(resolved)
    made = plan_for(resolved, cluster_there)
    chosen = choose([run.status for run in made.runs], runs)
    if there.profile is not None:
        names = {row.run_id for row in chosen if row.state in GIVEN_UP}
        again = [run for run in made.runs if run.status.run_id in names]
        # A Series without room is refused before anything is forgotten.
        backend.describe([*made.missing, *again])
        backend.check(resolved)
        if ending := wait_for_ending_jobs(resolved, chosen):
            errors.print(
                f"error: {backend.scheduler} job {', '.join(ending)} still saves what it has trained; say the same "
                "again when it has ended"
            )
            raise typer.Exit(1)
    concerned = reset_attempts(resolved.root, resolved.study.name, choose(rows_of(resolved), runs))
    console.print(f"{counted(len(concerned), 'run')} to be tried again")
    if not concerned:
        return
    jobs = jobs_of(resolved)
    made = plan_for(resolved, cluster_there, jobs)
    if taken_up := _taken_up(concerned, jobs):
        console.print(taken_up)
    if made.missing or not taken_up:
        _submit(resolved, made, backends)


def _as_before(
    resolved: ResolvedStudy, said: Options, cluster: str | None, snapshot: bool | None
) -> SubmitTarget:
    """Where a study goes again, `cluster` being the environment's where none was said."""
    meant, kept = as_before(said, last_options(resolved), cluster)
    if kept:
        console.print(kept)
    nodes = meant.nodes
    if nodes is not None and said.nodes is None and meant.cluster is not None:
        nodes = min(nodes, load_profile(meant.cluster).most_nodes)  # which may give fewer than it did
    assert meant.on is not None
    address = meant.ray_address or _ray_named(meant.on, meant.cluster)
    return target_of(meant.on, meant.cluster, snapshot, nodes, ray_address=address)


def _taken_up(rows: Sequence[RunStatus], jobs: Mapping[str, JobView]) -> str:
    """A sentence for those of these Runs that a job which packs them is still there to train; empty where none is."""
    packing = [job for row in rows if (job := jobs.get(row.run_id)) is not None and job.packed]
    live = [job.job_id for job in packing if job.state in LIVE]
    if not live:
        return ""
    return f"{counted(len(live), 'run')} left to job {', '.join(sorted(set(live)))}, which is not over and trains them"


def confirm(hours: float, where: str, limit: float = CONFIRM_GPU_HOURS, *, yes: bool) -> None:
    """Ask before much is spent; where nobody can answer, --yes has to be given."""
    if yes or hours <= limit:
        return
    question = f"submit {hours:.4g} GPU-hours to {where}"
    if not sys.stdin.isatty():
        raise InputError(
            f"{question}: more than confirm_gpu_hours, {limit:g}, which are submitted unasked; say --yes"
        )
    typer.confirm(f"{question}?", abort=True)


def _submit(resolved: ResolvedStudy, made: Plan, backends: Sequence[Backend]) -> None:
    """Train here, or hand what is missing to backends that outlive this process and say what was handed over."""
    if not backends[0].outlives:
        _train(resolved, made, backends[0])
        return
    done = hand_over(resolved, made, backends)
    for part in done:
        _say(part)
    name = resolved.study.name
    if not done:
        console.print(f"nothing of {name} is left to submit")
    place = resolved.root.path
    usual = {Path("runs"), Path(os.environ.get("SSMSCALE_ROOT", "runs"))}
    root = "" if place in usual else f" --root {shlex.quote(str(place))}"
    console.print(f"`ssmscale status {name}{root} --watch` shows how they do")


def _say(done: HandedOver) -> None:
    """Print what was handed over, what was left to others, and what has no room yet."""
    backend, profile = done.backend, done.backend.target.profile
    if done.waiting and profile is not None:
        errors.print(
            f"warning: {counted(done.waiting, 'series')} not submitted: {profile.name} takes {profile.limits.jobs} "
            "jobs of yours at once (limits.jobs); the same command submits them when some have ended"
        )
    if done.handles:
        allocation = done.handles[0].allocation
        packed = f" packed on {allocation}" if allocation else ""
        jobs = "job" if backend.is_packed else "jobs"
        whose = f"{backend.where}: {backend.scheduler}"
        console.print(
            f"{counted(len(done.runs), 'run')} in {counted(len(done.handles), 'series')}{packed} submitted to {whose} "
            f"{jobs} {', '.join(done.jobs)}"
        )
    if done.taken:
        console.print(f"{counted(done.taken, 'series')} left to another submission")


def _ray_named(on: str, cluster: str | None) -> str | None:
    """The Ray cluster that is meant by `--on ray` alone where the environment names one, as for Ray's own tools."""
    address = os.environ.get("RAY_ADDRESS") if on == "ray" and cluster is None else None
    if address:
        errors.print(f"to the Ray cluster at {address}, as RAY_ADDRESS says")
    return address or None


def _train(resolved: ResolvedStudy, made: Plan, backend: Backend) -> None:
    """Train what is missing, say what a study is left with, and end with 1 where a Run failed."""
    try:
        rows = train_here(resolved, made, backend, StudyProgress(console))
    except DiskFull as full:
        prune = f" (`ssmscale prune {resolved.study.name}` drops checkpoints no run needs)"
        remedy = full.remedy if full.is_read_only else full.remedy + prune
        errors.print(f"error: {full}; {remedy}, then the same command goes on from here")
        raise typer.Exit(1) from full
    print_summary(console, resolved.study.name, rows)
    if any(row.state is RunState.FAILED for row in rows):
        raise typer.Exit(1)
