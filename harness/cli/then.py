"""`submit --then evaluate`: evaluate what is finished once training is over.

A submission in the foreground evaluates after it has trained. Otherwise tasks are submitted that wait for the jobs that
train the Runs, however these end, and leave out the Runs that are not finished then.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated

import typer

from harness.cli.evaluate import NOT_DONE, ByTasks, print_scores
from harness.cli.tasks import TaskOptions
from harness.cli.terminal import listed
from harness.common.console import console, errors, warn
from harness.common.format import counted
from harness.dispatch.base import SubmitTarget
from harness.record.jobs import ELSEWHERE, LIVE, JobView
from harness.record.registry import ResolvedStudy
from harness.record.scores import evaluation_rows
from harness.record.status import RunState, RunStatus, StatusReader, count_states
from harness.submit.monitor import jobs_of
from ssmttm.errors import InputError

ThenOption = Annotated[
    str | None,
    typer.Option(
        "--then",
        metavar="VERB",
        help="evaluate measures what is finished once training is over, as evaluate does without options.",
    ),
]


def check_then(then: str | None) -> None:
    """Raise InputError for a verb that cannot follow training."""
    if then not in {None, "evaluate"}:
        raise InputError(f"--then {then}: no such verb follows training; choose evaluate")


def open_evaluation(resolved: ResolvedStudy, target: SubmitTarget) -> ByTasks:
    """Prepare the evaluation that follows training; raises InputError before anything is written."""
    from harness.evaluate.evaluator import Evaluator
    from harness.evaluate.request import Request

    evaluator = Evaluator.of(resolved, Request(), warn=warn)
    jobs = None if target.profile or target.ray_address else resolved.study.resources.jobs
    return ByTasks.open(resolved, evaluator, target, TaskOptions(jobs=jobs), only_finished=True)


def evaluation_hours(evaluation: ByTasks, rows: Sequence[RunStatus]) -> float:
    """Return the device hours that the evaluation of these Runs takes, roughly."""
    return sum(block.seconds for block in evaluation.blocks(rows)) / 3600


def evaluate_trained(evaluation: ByTasks) -> bool:
    """Evaluate the finished Runs here and print their scores; return False if one could not be evaluated."""
    from harness.tracking.sync import bring_up_to_date

    resolved = evaluation.resolved
    rows = StatusReader(resolved.root, resolved.study.name).read(resolved.points)
    finished = [row for row in rows if row.state is RunState.DONE]
    if not finished:
        errors.print("nothing to evaluate: no run has finished")
        return True
    done = evaluation.evaluate(finished)
    bring_up_to_date(resolved, rows)
    scores = evaluation_rows(resolved)
    print_scores(resolved.study.name, evaluation.evaluator, finished, done, scores)
    return not any(one.outcome in NOT_DONE for one in done)


def submit_evaluation(evaluation: ByTasks, submitted: Iterable[tuple[str, str]]) -> None:
    """Submit the evaluation of what is finished and of what jobs train; `submitted` has (Run, job number) just now."""
    resolved = evaluation.resolved
    jobs = jobs_of(resolved)
    rows = StatusReader(resolved.root, resolved.study.name).read(resolved.points, jobs=jobs)
    training = _training(rows, jobs, evaluation.backend.scheduler) | dict(submitted)
    wanted = [row for row in rows if row.state is RunState.DONE or row.run_id in training]
    if left := [row for row in rows if row not in wanted]:
        states = listed(count_states(left))
        errors.print(f"not evaluated: {states}; `ssmscale evaluate` evaluates them when they have finished")
    due = sum(not evaluation.evaluator.is_evaluated(row.run_id) for row in wanted)
    done = evaluation.evaluate(wanted, training, yes=True)
    held = sum(one.outcome in {"queued", "running"} for one in done)
    console.print(
        f"evaluation: {counted(len(wanted) - due, 'run')} evaluated, {held} by tasks that wait or run"
    )


def _training(rows: Sequence[RunStatus], jobs: Mapping[str, JobView], scheduler: str) -> dict[str, str]:
    """Return the number of the job that trains each Run, of those that tasks of this scheduler can wait for."""
    found = {}
    for row in rows:
        job = jobs.get(row.run_id)
        if row.state is RunState.DONE or job is None or job.state not in LIVE or job.slurm_state == ELSEWHERE:
            continue
        number = job.job_id.partition("_")[0]
        if number and number.isdigit() == (scheduler == "SLURM"):
            found[row.run_id] = number
    return found
