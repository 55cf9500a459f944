"""Work of other verbs than `submit` that tasks may do: the options that say where, and what is printed of it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated

import typer

from harness.cli.options import TargetOptions, named_cluster
from harness.common.console import errors, print_line
from harness.common.format import counted
from harness.dispatch.base import Backend, SubmitTarget
from harness.evaluate.sharing import Block
from harness.evaluate.tasks import Ended, Whole, do_here, hand_over
from harness.plan.cluster import CONFIRM_GPU_HOURS, Cluster
from harness.record.jobs import SchedulerUnavailable
from harness.submit.parts import PartState, PartStatus, open_backend_for_parts
from harness.submit.target import target_of
from ssmttm.errors import InputError


@dataclass(frozen=True)
class TaskOptions:
    """Place of tasks, beside the machines, and their number."""

    on: Annotated[
        str | None,
        typer.Option(
            "--on",
            metavar="WHERE",
            help="Divide the work among tasks: local runs them here, in the foreground; slurm submits a job for each "
            "and returns; ray packs them as submit does; auto is slurm with --cluster, else local (default: no tasks).",
        ),
    ] = None
    parts: Annotated[
        int | None,
        typer.Option("--parts", min=1, metavar="N", help="Number of tasks (default: of ten minutes each)."),
    ] = None
    jobs: Annotated[
        int | None, typer.Option("--jobs", min=1, metavar="N", help="Most tasks at once on this machine.")
    ] = None


def submit_target(on: str, machines: TargetOptions) -> SubmitTarget:
    """Return the target of these options; with `--on ray` alone the Ray cluster of RAY_ADDRESS, as for Ray's tools."""
    address = machines.ray_address
    if address is None and on == "ray" and machines.cluster is None:
        address = os.environ.get("RAY_ADDRESS") or None
        if address:
            errors.print(f"to the Ray cluster at {address}, as RAY_ADDRESS says")
    return target_of(on, machines.cluster, machines.snapshot, machines.nodes, ray_address=address)


def task_target(context: typer.Context, tasks: TaskOptions, machines: TargetOptions) -> SubmitTarget | None:
    """Return the target of the tasks; None without --on. Raises InputError for options that need another one."""
    cluster = named_cluster(context, machines.cluster)
    if tasks.on is None:
        given = {
            "--cluster": cluster,
            "--nodes": machines.nodes,
            "--ray-address": machines.ray_address,
            "--snapshot": machines.snapshot,
            "--parts": tasks.parts,
            "--jobs": tasks.jobs,
        }
        for option, value in given.items():
            if value is not None:
                raise InputError(f"{option} {value}: applies to tasks; say with --on where they run")
        return None
    if machines.ray_address is not None:
        machines = replace(machines, cluster=cluster)
    return submit_target(tasks.on, machines)


def open_tasks(
    target: SubmitTarget, whole: Whole, places: Mapping[str, Path], jobs: int | None = None
) -> tuple[Backend, Cluster]:
    """Open the backend of tasks that need these paths; raises InputError before anything is written.

    `places` has the path below which they write, then the others, each by the name that the user knows.
    """
    backend = open_backend_for_parts(target, whole.jobs_dir, jobs)
    if jobs is not None and backend.outlives:
        raise InputError(
            f"--jobs {jobs}: applies to tasks on this machine; a profile's limits.parallel limits those on a cluster"
        )
    cluster = backend.offer(dict(list(places.items())[:2]))
    backend.check(places)
    return backend, cluster


def do_by_tasks(
    whole: Whole,
    blocks: Sequence[Block],
    backend: Backend,
    cluster: Cluster,
    tasks: TaskOptions,
    *,
    training: Mapping[str, str] = MappingProxyType({}),
    yes: bool = False,
) -> Ended:
    """Do the blocks by tasks: here until all have ended, or by jobs that are submitted. Print what is submitted.

    `training` are the jobs that train Runs, by Run; submitted tasks begin when these are over.
    """
    if not backend.outlives:
        return do_here(whole, blocks, backend, cluster, tasks.parts, _Progress())
    confirm(sum(block.seconds for block in blocks) / 3600, backend.where, backend.confirm_gpu_hours, yes=yes)
    try:
        ended = hand_over(whole, blocks, backend, cluster, tasks.parts, training)
    except SchedulerUnavailable as gone:
        safe = "repeat the command when it answers: what it has taken stays, and nothing is submitted twice"
        raise SchedulerUnavailable(gone.scheduler, f"{gone}; {safe}") from gone
    if ended.handles:
        jobs = dict.fromkeys(handle.job_id.partition("_")[0] for handle in ended.handles)
        trainers = ", ".join(dict.fromkeys(training.values()))
        begin = f"; they begin when jobs {trainers} are over, however these end" if trainers else ""
        errors.print(
            f"{counted(len(ended.handles), 'task')} submitted to {backend.where}: {backend.scheduler} jobs "
            f"{', '.join(jobs)}{begin}"
        )
    if ended.waiting:
        errors.print(
            f"warning: {counted(ended.waiting, 'task')} not submitted: {backend.where} takes no more jobs of yours "
            "now (limits.jobs); repeat the command when some have ended"
        )
    return ended


class _Progress:
    """Prints a line whenever another task has ended."""

    def __init__(self) -> None:
        self._over = -1

    def __call__(self, states: Sequence[PartStatus]) -> None:
        ended = [one for one in states if one.state in {PartState.DONE, PartState.FAILED}]
        if len(ended) != self._over:
            self._over = len(ended)
            failed = sum(one.state is PartState.FAILED for one in ended)
            more = f", {failed} of them failed" if failed else ""
            errors.print(f"{self._over} of {counted(len(states), 'task')} over{more}")


def print_states(ended: Ended) -> None:
    """Print the state of each task that is known."""
    for one in ended.held.states:
        job = f" job {one.job_id}:" if one.job_id else ""
        print_line(f"task {one.part.series_id}:{job} {one.state}{f': {one.reason}' if one.reason else ''}")


def confirm(hours: float, where: str, limit: float = CONFIRM_GPU_HOURS, *, yes: bool) -> None:
    """Ask before a large submission; raises InputError without a terminal to ask on."""
    if yes or hours <= limit:
        return
    question = f"submit {hours:.4g} GPU-hours to {where}"
    if not sys.stdin.isatty():
        raise InputError(
            f"{question}: more than confirm_gpu_hours, {limit:g}; give --yes to submit them without a question"
        )
    typer.confirm(f"{question}?", abort=True)
