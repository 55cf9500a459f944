"""`ssmscale evaluate`: scores of finished runs, in this process or by tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness.cli.options import (
    DeviceOption,
    JsonOption,
    RootOption,
    RunsArgument,
    StudyArgument,
    TargetOptions,
    YesOption,
)
from harness.cli.tasks import TaskOptions, do_by_tasks, open_tasks, task_target
from harness.cli.terminal import Table, plain_text
from harness.common.console import Stopped, console, errors, print_json, stoppable, warn
from harness.common.disk import write_atomically
from harness.common.format import counted
from harness.dispatch.base import Backend, SubmitTarget
from harness.evaluate.sharing import Block
from harness.evaluate.tasks import Ended, Held, Whole
from harness.plan.cluster import Cluster
from harness.record.points import check_output
from harness.record.registry import ResolvedStudy, registered
from harness.record.scores import HELD_OUT, EvaluationRow, as_csv, evaluation_rows
from harness.record.status import RunState, RunStatus
from harness.submit.monitor import begun, choose
from ssmttm.device import best_device
from ssmttm.errors import InputError

if TYPE_CHECKING:
    from harness.evaluate.evaluator import Evaluator
    from harness.evaluate.request import Evaluated


NOT_DONE = frozenset({"busy", "impossible", "failed"})
"""Outcomes for which the command exits with 1."""


@dataclass(frozen=True)
class SamplingOptions:
    """Settings by which a model generates."""

    guidance: Annotated[
        float,
        typer.Option(
            help="Weight of the caption: 1 is the model's own, 0 ignores captions, above 1 follows them closer."
        ),
    ] = 3.0
    temperature: Annotated[float, typer.Option(help="Temperature; below 1 prefers likely tokens.")] = 1.0
    top_k: Annotated[int, typer.Option(help="Draw from the K likeliest tokens; 0 draws from all.")] = 250
    seed: Annotated[
        int, typer.Option(min=0, max=2**62, help="Seed of the first prompt; each further one takes the next.")
    ] = 0
    device: DeviceOption = None

    def draws(self) -> dict[str, Any]:
        """Return the fields of ssmttm's Sampling."""
        return {"temperature": self.temperature, "top_k": self.top_k or None, "guidance": self.guidance}

    def best_device(self) -> str:
        """Return the device that was asked for, else a GPU if there is one."""
        if self.device is not None:
            return self.device
        return best_device()


@dataclass(frozen=True)
class EvaluateOptions:
    """Prompts, references and judges of an evaluation: fields of its Request."""

    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Captions to generate for: CSV (as MusicCaps'), JSON, JSON lines, or text with one a line "
            "(default: the held-out captions).",
        ),
    ] = None
    reference: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Recordings to compare with, named by the prompts' column path, audio or ytid (default: the held-out "
            "clips, decoded by the codec).",
        ),
    ] = None
    clap: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="CLAP model for CLAP score and Frechet distance: a folder or hub name."
        ),
    ] = None
    tagger: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="AST audio tagger for the KL divergence: a folder or hub name."),
    ] = None
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Use the first N prompts.")] = None
    batch: Annotated[int, typer.Option(min=1, help="Prompts generated at once.")] = 16


def evaluate(
    context: typer.Context,
    study: StudyArgument,
    runs: RunsArgument = None,
    *,
    options: EvaluateOptions,
    sampling: SamplingOptions,
    tasks: TaskOptions,
    machines: TargetOptions,
    yes: YesOption = False,
    root: RootOption = None,
    as_json: JsonOption = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="F.csv", help="Write every result of the study as CSV."),
    ] = None,
) -> None:
    """Measure finished runs: held-out loss, quality of their music.

    The music is generated for captions and compared with recordings. With --on tasks share the runs and their prompts;
    on a cluster the command returns, and the same command shows their state, then the scores.
    """
    check_output(out, ".csv")
    target = sampling_target(context, tasks, machines, sampling)
    resolved = registered(study, root)
    chosen = _finished(choose(begun(resolved), runs), named=bool(runs))
    from harness.evaluate.evaluator import Evaluator
    from harness.evaluate.request import Request
    from harness.tracking.sync import bring_up_to_date

    device = sampling.best_device() if target is None else "cpu"
    request = Request(**asdict(options), **sampling.draws(), seed=sampling.seed, device=device)
    with errors.status("opening the study") as shown, stoppable():
        try:
            evaluator = Evaluator.of(resolved, request, shown.update, warn)
            done = _evaluate_here(evaluator, chosen, shown.update) if target is None else []
        except KeyboardInterrupt as interrupt:
            raise Stopped from interrupt
    if target is not None:
        done = ByTasks.open(resolved, evaluator, target, tasks).evaluate(chosen, yes=yes)
    bring_up_to_date(resolved, begun(resolved))
    rows = evaluation_rows(resolved)
    if out is not None:
        write_atomically(out, as_csv(rows))
    if as_json:
        settings = evaluator.settings
        print_json(
            {
                "study": resolved.study.name,
                "settings": {HELD_OUT: None, settings.digest: settings.model_dump(mode="json")},
                "runs": [asdict(one) for one in done],
                "rows": [asdict(row) for row in rows],
                "skipped": evaluator.skipped,
                "notes": evaluator.notes,
            }
        )
    else:
        print_scores(resolved.study.name, evaluator, chosen, done, rows)
    if any(one.outcome in NOT_DONE for one in done):
        raise typer.Exit(1)


def _evaluate_here(
    evaluator: Evaluator, chosen: Sequence[RunStatus], show: Callable[[str], None]
) -> list[Evaluated]:
    """Evaluate Runs one after the other in this process."""
    done = []
    for number, row in enumerate(chosen, 1):
        show(f"run {number} of {len(chosen)}: {row.run_id}")
        done.append(evaluator.evaluate(row.run_id))
    return done


@dataclass(frozen=True)
class ByTasks:
    """The evaluation of a study's Runs by tasks of a backend."""

    resolved: ResolvedStudy
    evaluator: Evaluator
    whole: Whole
    backend: Backend
    cluster: Cluster
    tasks: TaskOptions

    @classmethod
    def open(
        cls,
        resolved: ResolvedStudy,
        evaluator: Evaluator,
        target: SubmitTarget,
        tasks: TaskOptions,
        *,
        only_finished: bool = False,
    ) -> ByTasks:
        """Open the backend; raises InputError if tasks cannot work there, before anything is written."""
        from harness.evaluate.scores import places, whole_of

        whole = whole_of(resolved, evaluator, only_finished=only_finished)
        backend, cluster = open_tasks(target, whole, places(resolved, evaluator.request), tasks.jobs)
        return cls(resolved, evaluator, whole, backend, cluster, tasks)

    def blocks(self, rows: Sequence[RunStatus]) -> list[Block]:
        """Return what these Runs lack."""
        from harness.evaluate.scores import blocks_left

        return blocks_left(self.evaluator, rows, self.cluster)

    def evaluate(
        self, rows: Sequence[RunStatus], training: Mapping[str, str] | None = None, *, yes: bool = False
    ) -> list[Evaluated]:
        """Have tasks evaluate what no live task has, after the jobs of `training`; return what is known of each Run."""
        from harness.evaluate.scores import evaluated_by

        known = [row.run_id for row in rows if self.evaluator.is_evaluated(row.run_id)]
        ended = Ended([], 0, Held([]))
        if blocks := self.blocks(rows):
            ended = do_by_tasks(
                self.whole, blocks, self.backend, self.cluster, self.tasks, training=training or {}, yes=yes
            )
        return evaluated_by(self.evaluator, rows, known, ended)


def sampling_target(
    context: typer.Context, tasks: TaskOptions, machines: TargetOptions, sampling: SamplingOptions
) -> SubmitTarget | None:
    """Return the target of tasks that generate; None without --on. Raises InputError if the options contradict."""
    target = task_target(context, tasks, machines)
    if target is not None and sampling.device is not None:
        raise InputError(
            f"--device {sampling.device}: applies to this process; a task computes on the GPU that --on {tasks.on} "
            "gives it, else on the CPU"
        )
    return target


def _finished(rows: Sequence[RunStatus], *, named: bool) -> list[RunStatus]:
    """Return the finished rows; raises InputError if there are none, or if a row that was named is not finished."""
    done = [row for row in rows if row.state is RunState.DONE]
    left = [row for row in rows if row.state is not RunState.DONE]
    if left and (named or not done):
        raise InputError(f"run {left[0].run_id}: is {left[0].state}; only finished runs can be evaluated")
    return done


def print_scores(
    study: str,
    evaluator: Evaluator,
    chosen: Sequence[RunStatus],
    done: Sequence[Evaluated],
    rows: Sequence[EvaluationRow],
) -> None:
    """Print a table of the scores, the reference of the comparison, and notes that limit their meaning."""
    settings = evaluator.settings
    # Rows of one codebook are only in --json and --out.
    whole = [row for row in rows if not row.metric.startswith(("ce_", "ppl_"))]
    mine = [row for row in whole if row.settings in {HELD_OUT, settings.digest}]
    values = {(row.run_id, row.metric): row.value for row in mine}
    metrics = list(dict.fromkeys(row.metric for row in mine))
    numbers = ("parameters", "iterations", "seed", *metrics)
    table = Table(f"study {study}", ("run", "architecture", *numbers, "evaluation"), numbers)
    for row, ended in zip(chosen, done, strict=True):
        assert row.result is not None
        table.add_row(
            row.run_id,
            row.point.architecture,
            f"{row.result['n_params']:,}",
            f"{row.point.run.iterations:,}",
            str(row.point.run.seed),
            *(f"{values[row.run_id, name]:.4g}" if (row.run_id, name) in values else "-" for name in metrics),
            ended.outcome + (f": {ended.reason}" if ended.reason else ""),
        )
    table.print(console)
    pairs = "pairs" if evaluator.prompts.paired else "sets"
    prompts = counted(settings.n_prompts, "prompt")
    console.print(f"settings {settings.digest}: {prompts}; {settings.reference}, compared as {pairs}")
    for metric, why in evaluator.skipped.items():
        console.print(f"not measured: {metric}: {why}")
    for note in dict.fromkeys([*evaluator.notes, *(note for one in done for note in one.notes)]):
        errors.print(f"note: {plain_text(note)}")
