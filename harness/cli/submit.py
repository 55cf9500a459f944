"""`ssmscale submit` and `retry`: train a study here or on a cluster, by the plan that both begin with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated

import typer

from harness.cli.display import StudyProgress, print_summary
from harness.cli.options import (
    DryRunOption,
    OnOption,
    RootOption,
    RunsArgument,
    SetOption,
    StudyArgument,
    TargetOptions,
    YesOption,
    named_cluster,
)
from harness.cli.plan import print_plan
from harness.cli.tasks import confirm, submit_target
from harness.cli.terminal import listed
from harness.cli.then import (
    ThenOption,
    check_then,
    evaluate_trained,
    evaluation_hours,
    open_evaluation,
    submit_evaluation,
)
from harness.common.console import console, errors, warn
from harness.common.disk import DiskFull
from harness.common.format import counted, hint
from harness.dispatch.base import Backend, SubmitTarget
from harness.plan.cluster import load_profile
from harness.plan.plan import OTHER_EVALUATIONS, Plan, check_room
from harness.record.jobs import LIVE, JobView, SchedulerUnavailable
from harness.record.registry import ResolvedStudy, check_before_training, open_study, register, to_retry
from harness.record.status import RunState, RunStatus
from harness.submit.cancel import reset_attempts, wait_for_ending_jobs
from harness.submit.foreground import train_here
from harness.submit.monitor import choose, jobs_of, plan_for, rows_of
from harness.submit.submission import HandedOver, by_array, hand_over, keep_plan, kept_by_jobs, number_of
from harness.submit.target import Options, as_before, backends_of, last_options


def submit(
    context: typer.Context,
    study: StudyArgument,
    on: OnOption,
    root: RootOption = None,
    changes: SetOption = None,
    *,
    machines: TargetOptions,
    then: ThenOption = None,
    dry_run: DryRunOption = False,
    yes: YesOption = False,
) -> None:
    """Train every run of a study that has not finished.

    Interrupted runs go on from their last checkpoints.
    """
    check_then(then)
    if machines.ray_address is not None:
        machines = replace(machines, cluster=named_cluster(context, machines.cluster))
    target = submit_target(on, machines)
    resolved = open_study(study, root, changes)
    check_before_training(resolved)
    backends = backends_of(target, resolved)
    backend = backends[0]
    # Every mistake is reported before anything is written.
    made = plan_for(resolved, backend.offer(resolved.places))
    shares = backend.describe(made.missing)
    backend.check(resolved.places)
    evaluation = open_evaluation(resolved, target) if then else None
    if dry_run:
        print_plan(made)
        for line in shares:
            console.print(line)
        return
    _warn_of_room(resolved, made, backend)
    if backend.outlives:
        hours = made.totals()["gpu_hours"]
        if evaluation is not None:
            hours += evaluation_hours(evaluation, [run.status for run in made.runs])
        confirm(hours, backend.where, backend.confirm_gpu_hours, yes=yes)
    warn(*(text for code, text in made.notes if code == OTHER_EVALUATIONS))
    register(resolved)
    keep_plan(resolved.root, made)
    if backend.outlives:
        done = _hand_over(resolved, made, backends)
        if evaluation is not None:
            handles = [handle for part in done for handle in part.handles]
            submit_evaluation(
                evaluation,
                ((run.name, number_of(handle)) for handle in handles for run in handle.task.run_dirs),
            )
    else:
        is_well = _train(resolved, made, backend)
        if evaluation is not None:
            is_well = evaluate_trained(evaluation) and is_well
        if not is_well:
            raise typer.Exit(1)
    runs, differing = kept_by_jobs(resolved, made)
    if runs:
        name, root = resolved.study.name, resolved.root.path
        errors.print(
            f"warning: {counted(runs, 'run')} with jobs of other resources, which they keep ({'; '.join(differing)}); "
            f"{hint('cancel', name, root=root)}, then {hint('retry', study, root=root)} submits them with those of the "
            "file"
        )


def retry(
    context: typer.Context,
    study: StudyArgument,
    runs: RunsArgument = None,
    root: RootOption = None,
    on: Annotated[
        str | None,
        typer.Option(
            "--on",
            metavar="WHERE",
            help="As for submit. Options that are not given are those of the last submission, whatever "
            "SSMSCALE_CLUSTER says.",
        ),
    ] = None,
    *,
    machines: TargetOptions,
) -> None:
    """Reset failed and cancelled runs, then submit what is missing.

    A YAML file with the same runs gives the resources; else they are as last submitted.
    """
    resolved = to_retry(study, root)
    target = _target_as_before(resolved, on, machines, named_cluster(context, machines.cluster))
    check_before_training(resolved)
    backends = backends_of(target, resolved)
    backend = backends[0]
    offered = backend.offer(resolved.places)
    made = plan_for(resolved, offered)
    chosen = choose([run.status for run in made.runs], runs)
    if target.profile is not None:
        ended = {RunState.FAILED, RunState.CANCELLED}
        again = {row.run_id for row in chosen if row.state in ended}
        # A series that fits on no node is refused before any attempt is reset.
        backend.describe([*made.missing, *(run for run in made.runs if run.status.run_id in again)])
        backend.check(resolved.places)
        if ending := wait_for_ending_jobs(resolved, chosen):
            errors.print(
                f"error: {backend.scheduler} job {', '.join(ending)} is still saving; repeat the command when it has "
                "ended"
            )
            raise typer.Exit(1)
    if resolved.record is None:
        register(resolved)
    concerned = reset_attempts(resolved.root, resolved.study.name, choose(rows_of(resolved), runs))
    console.print(f"{counted(len(concerned), 'run')} to be tried again")
    if not concerned:
        return
    # A Run that joined another submission joins again: the work on its Series may be ending.
    jobs = {run_id: job for run_id, job in jobs_of(resolved).items() if not job.study}
    made = plan_for(resolved, offered, jobs)
    if taken_up := _taken_up(concerned, jobs):
        console.print(taken_up)
    if made.missing or made.shared or not taken_up:
        _warn_of_room(resolved, made, backend)
        if backend.outlives:
            _hand_over(resolved, made, backends)
        elif not _train(resolved, made, backend):
            raise typer.Exit(1)


def _target_as_before(
    resolved: ResolvedStudy, on: str | None, machines: TargetOptions, named: str | None
) -> SubmitTarget:
    """Return the target of these options, each that is not given as in the last submission.

    named: the cluster given with --cluster; `machines` may hold that of the environment.
    """
    given = Options(on, named, machines.nodes, machines.ray_address)
    meant, kept = as_before(given, last_options(resolved, given), machines.cluster)
    if kept:
        console.print(kept)
    nodes = meant.nodes
    if nodes is not None and given.nodes is None and meant.cluster is not None:
        nodes = min(nodes, load_profile(meant.cluster).most_nodes)  # the profile may have changed
    assert meant.on is not None
    return submit_target(meant.on, TargetOptions(meant.cluster, nodes, meant.ray_address, machines.snapshot))


def _taken_up(rows: Sequence[RunStatus], jobs: Mapping[str, JobView]) -> str:
    """Return a sentence about those of these Runs that a live packed job will train; empty if there are none."""
    packing = [job for row in rows if (job := jobs.get(row.run_id)) is not None and job.packed]
    live = [job.job_id for job in packing if job.state in LIVE]
    if not live:
        return ""
    return f"{counted(len(live), 'run')} left to job {', '.join(sorted(set(live)))}, which is not over and trains them"


def _warn_of_room(resolved: ResolvedStudy, made: Plan, backend: Backend) -> None:
    """Warn if ROOT has too little room for the missing Runs; raises DiskFull if it has none for a checkpoint."""
    series = len({run.series_id for run in made.missing})
    if (short := check_room(made, resolved.root, backend.count_at_once(series))) is not None:
        errors.print(f"warning: {short}", soft_wrap=True)


def _hand_over(resolved: ResolvedStudy, made: Plan, backends: Sequence[Backend]) -> list[HandedOver]:
    """Hand what is missing to backends that outlive this process; print and return what was handed over."""
    name = resolved.study.name
    try:
        done = hand_over(resolved, made, backends)
    except SchedulerUnavailable as gone:
        safe = "repeat the command when it answers: what it has taken stays, and no run is submitted twice"
        raise SchedulerUnavailable(gone.scheduler, f"{gone}; {safe}") from gone
    for part in done:
        _print_handed_over(part)
    if not done:
        console.print(f"nothing of {name} is left to submit{_left_out(made)}")
    place = resolved.root.path
    console.print(f"{hint('status', name, '--watch', root=place)} shows their progress")
    return done


def _left_out(made: Plan) -> str:
    """Return a clause about the runs that `submit` leaves out and `retry` trains; empty without any."""
    ended = [run.status.state for run in made.runs]
    counts = {
        str(state): ended.count(state) for state in (RunState.FAILED, RunState.CANCELLED) if state in ended
    }
    return f"; {listed(counts)}: `ssmscale retry {made.study.name}` trains them" if counts else ""


def _print_handed_over(done: HandedOver) -> None:
    """Print what was handed over, what another submission trains, and what exceeds the limit of jobs."""
    backend, profile = done.backend, done.backend.target.profile
    if done.waiting and profile is not None:
        errors.print(
            f"warning: {counted(done.waiting, 'series')} not submitted: {profile.name} takes {profile.limits.jobs} "
            "jobs of yours at once (limits.jobs); repeat the command when some have ended"
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
    for (study, array), trainers in by_array(done.joined).items():
        if count := sum(len(trainer.runs) for trainer in trainers):
            join, their = ("joins", "its") if count == 1 else ("join", "their")
            ids = {trainer.job_id for trainer in trainers}
            jobs = f"job {ids.pop()}" if len(ids) == 1 and "" not in ids else counted(len(ids), "job")
            whose = f"{jobs} of study {study}" if array else "the process"
            console.print(f"{counted(count, 'run')} {join} {whose}, which trains {their} trunk")
    if done.taken:
        errors.print(
            f"warning: {counted(done.taken, 'series')} not submitted: a job that trained it is ending; repeat the "
            "command when it has ended"
        )


def _train(resolved: ResolvedStudy, made: Plan, backend: Backend) -> bool:
    """Train what is missing and print the result; return False if a Run failed."""
    try:
        rows = train_here(resolved, made, backend, StudyProgress(console))
    except DiskFull as full:
        prune = (
            f" ({hint('prune', resolved.study.name, root=resolved.root.path)} drops checkpoints no run needs)"
        )
        remedy = full.remedy if full.is_read_only else full.remedy + prune
        errors.print(f"error: {full}; {remedy}, then the same command goes on from here")
        raise typer.Exit(1) from full
    print_summary(console, resolved.study.name, rows, resolved.root.path)
    return not any(row.state is RunState.FAILED for row in rows)
