"""`ssmscale evaluate`: how good the finished runs of a study are, by loss and by ear."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness.evaluations import HELD_OUT, EvaluationRow, as_csv, evaluation_rows
from harness.opening import begun, choose, registered
from harness.options import JsonOption, RootOption, RunsArgument, StudyArgument
from harness.rundir import write_atomically
from harness.sheet import Sheet, plain_text
from harness.status import RunState, RunStatus
from harness.terminal import console, counted, errors, print_json, stoppable, warn
from ssmttm.errors import InputError

if TYPE_CHECKING:
    from harness.evaluating import Evaluated, Evaluator


def evaluate(
    study: StudyArgument,
    runs: RunsArgument = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Captions to generate for: CSV, JSON or JSON lines, such as MusicCaps' CSV, or text with one a line "
            "(default: the held-out captions).",
        ),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Recordings to compare with; the prompts' path, audio or ytid names theirs (default: the held-out "
            "clips, decoded by the codec).",
        ),
    ] = None,
    clap: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="CLAP model, a folder or a name on the hub: CLAP score, FD."),
    ] = None,
    tagger: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="AST audio tagger, a folder or a name on the hub: KL divergence."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Use the first N prompts.")] = None,
    guidance: Annotated[
        float, typer.Option(help="How far captions are followed; 1 is the model's own word.")
    ] = 3.0,
    temperature: Annotated[float, typer.Option(help="Of sampling.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Likeliest codes drawn from; 0 takes all.")] = 250,
    seed: Annotated[int, typer.Option(min=0, help="Of sampling.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Prompts at once.")] = 16,
    device: Annotated[
        str | None, typer.Option(metavar="D", help="cpu, cuda, cuda:1 (default: a GPU where there is one).")
    ] = None,
    root: RootOption = None,
    as_json: JsonOption = False,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="F.csv", help="Write every result of the study as CSV.")
    ] = None,
) -> None:
    """Measure finished runs: held-out loss, and how near what they generate comes to music and to its captions."""
    if out is not None and out.suffix != ".csv":
        raise InputError(f"--out {out}: does not end in .csv")
    resolved = registered(study, root)
    chosen = _finished(choose(begun(resolved), runs), named=bool(runs))
    import torch

    from harness.evaluating import Evaluator, Outcome, Request
    from harness.foreground import Stopped
    from harness.syncing import bring_up_to_date

    request = Request(
        prompts=prompts,
        reference=reference,
        clap=clap,
        tagger=tagger,
        limit=limit,
        temperature=temperature,
        top_k=top_k or None,
        guidance=guidance,
        seed=seed,
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
        batch=batch,
    )
    with errors.status("opening the study") as shown, stoppable():
        try:
            evaluator = Evaluator(resolved, request, shown.update, warn)
            done = []
            for number, row in enumerate(chosen, 1):
                done.append(evaluator.evaluate(row.run_id))
                errors.print(f"{number} of {len(chosen)}: run {row.run_id} {done[-1].outcome}", markup=False)
        except KeyboardInterrupt as interrupt:
            raise Stopped from interrupt
    bring_up_to_date(resolved, begun(resolved))
    rows = evaluation_rows(resolved)
    if out is not None:
        write_atomically(out, as_csv(rows))
    if as_json:
        print_json(_document(resolved.study.name, evaluator, done, rows))
    else:
        _print(resolved.study.name, evaluator, chosen, done, rows)
    if any(one.outcome in {Outcome.BUSY, Outcome.IMPOSSIBLE} for one in done):
        raise typer.Exit(1)


def _finished(rows: Sequence[RunStatus], *, named: bool) -> list[RunStatus]:
    """The finished ones; raises InputError where there are none, or one that was named is not."""
    done = [row for row in rows if row.state is RunState.DONE]
    left = [row for row in rows if row.state is not RunState.DONE]
    if left and (named or not done):
        raise InputError(f"run {left[0].run_id}: is {left[0].state}; only finished runs can be evaluated")
    return done


def _document(
    study: str, evaluator: Evaluator, done: Sequence[Evaluated], rows: Sequence[EvaluationRow]
) -> dict[str, Any]:
    """What --json prints."""
    return {
        "study": study,
        "settings": {HELD_OUT: None, evaluator.settings.digest: evaluator.settings.model_dump(mode="json")},
        "runs": [asdict(one) for one in done],
        "rows": [asdict(row) for row in rows],
        "skipped": evaluator.skipped,
        "notes": evaluator.notes,
    }


def _print(
    study: str,
    evaluator: Evaluator,
    chosen: Sequence[RunStatus],
    done: Sequence[Evaluated],
    rows: Sequence[EvaluationRow],
) -> None:
    """A table of what was asked for, what it was compared with, and what limits it."""
    settings = evaluator.settings
    mine = [row for row in rows if row.settings in {HELD_OUT, settings.digest} and not _of_a_codebook(row)]
    values = {(row.run_id, row.metric): row.value for row in mine}
    metrics = list(dict.fromkeys(row.metric for row in mine))
    numbers = ("parameters", "iterations", "seed", *metrics)
    sheet = Sheet(f"study {study}", ("run", "architecture", *numbers, "evaluation"), numbers)
    for row, ended in zip(chosen, done, strict=True):
        assert row.result is not None
        sheet.add_row(
            row.run_id,
            row.point.architecture,
            f"{row.result['n_params']:,}",
            f"{row.point.run.iterations:,}",
            str(row.point.run.seed),
            *(f"{values[row.run_id, name]:.4g}" if (row.run_id, name) in values else "-" for name in metrics),
            ended.outcome + (f": {ended.reason}" if ended.reason else ""),
        )
    sheet.print(console)
    pairs = "pairs" if evaluator.prompts.paired else "sets"
    prompts = counted(settings.n_prompts, "prompt")
    console.print(
        f"settings {settings.digest}: {prompts}; {settings.reference}, compared as {pairs}", markup=False
    )
    for metric, why in evaluator.skipped.items():
        console.print(f"not measured: {metric}: {why}", markup=False)
    for note in dict.fromkeys([*evaluator.notes, *(note for one in done for note in one.notes)]):
        errors.print(f"note: {plain_text(note)}", markup=False)


def _of_a_codebook(row: EvaluationRow) -> bool:
    """Whether it is one of the many that --json and --out tell and a table has no room for."""
    return row.metric.startswith(("ce_", "ppl_"))
