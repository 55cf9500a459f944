"""The verbs of trained models: `ssmscale evaluate` measures finished runs, `ssmscale generate` makes music by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness.cli.options import JsonOption, RootOption, RunsArgument, StudyArgument
from harness.cli.terminal import Table, plain_text
from harness.common.console import Stopped, console, errors, print_json, print_line, stoppable, warn
from harness.common.disk import write_atomically
from harness.common.format import counted
from harness.record.registry import registered
from harness.record.root import Root
from harness.record.scores import HELD_OUT, EvaluationRow, as_csv, evaluation_rows
from harness.record.status import RunState, RunStatus
from harness.submit.monitor import begun, choose
from ssmttm.errors import InputError

if TYPE_CHECKING:
    from harness.evaluate.evaluator import Evaluated, Evaluator


@dataclass(frozen=True)
class EvaluateOptions:
    """Fields of the evaluation's Request: what to generate for, what to compare with, and how to sample."""

    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Captions to generate for: CSV, JSON or JSON lines, such as MusicCaps' CSV, or text with one a line "
            "(default: the held-out captions).",
        ),
    ] = None
    reference: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Recordings to compare with; the prompts' path, audio or ytid names theirs (default: the held-out "
            "clips, decoded by the codec).",
        ),
    ] = None
    clap: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="CLAP model, a folder or a name on the hub: CLAP score, FD."),
    ] = None
    tagger: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="AST audio tagger, a folder or a name on the hub: KL divergence."),
    ] = None
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Use the first N prompts.")] = None
    guidance: Annotated[
        float, typer.Option(help="How far captions are followed; 1 is the model's own word.")
    ] = 3.0
    temperature: Annotated[float, typer.Option(help="Of sampling.")] = 1.0
    top_k: Annotated[int, typer.Option(min=0, help="Likeliest codes drawn from; 0 takes all.")] = 250
    seed: Annotated[int, typer.Option(min=0, help="Of sampling.")] = 0
    batch: Annotated[int, typer.Option(min=1, help="Prompts at once.")] = 16
    device: Annotated[
        str | None, typer.Option(metavar="D", help="cpu, cuda, cuda:1 (default: a GPU where there is one).")
    ] = None


def evaluate(
    study: StudyArgument,
    runs: RunsArgument = None,
    *,
    options: EvaluateOptions,
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
    from harness.evaluate.evaluator import Evaluator, Request
    from harness.tracking.sync import bring_up_to_date

    settled = {"top_k": options.top_k or None, "device": options.device or _best_device()}
    request = Request(**asdict(options) | settled)
    with errors.status("opening the study") as shown, stoppable():
        try:
            evaluator = Evaluator(resolved, request, shown.update, warn)
            done = []
            for number, row in enumerate(chosen, 1):
                done.append(evaluator.evaluate(row.run_id))
                errors.print(f"{number} of {len(chosen)}: run {row.run_id} {done[-1].outcome}")
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
    if any(one.outcome in {"busy", "impossible"} for one in done):
        raise typer.Exit(1)


def _finished(rows: Sequence[RunStatus], *, named: bool) -> list[RunStatus]:
    """Return the finished ones; raises InputError where there are none, or a named one is not finished."""
    done = [row for row in rows if row.state is RunState.DONE]
    left = [row for row in rows if row.state is not RunState.DONE]
    if left and (named or not done):
        raise InputError(f"run {left[0].run_id}: is {left[0].state}; only finished runs can be evaluated")
    return done


def _document(
    study: str, evaluator: Evaluator, done: Sequence[Evaluated], rows: Sequence[EvaluationRow]
) -> dict[str, Any]:
    """Return the document of `ssmscale evaluate --json`."""
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
    """Print a table of the scores, what they were compared with, and what limits them."""
    settings = evaluator.settings
    mine = [row for row in rows if row.settings in {HELD_OUT, settings.digest} and not _of_a_codebook(row)]
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


def _of_a_codebook(row: EvaluationRow) -> bool:
    """True for the many rows that --json and --out give and a table has no room for."""
    return row.metric.startswith(("ce_", "ppl_"))


def generate(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="A finished run: its id, its first digits, or its folder.")
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="F.wav", help="The file to write, or a folder for several.")
    ],
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", metavar="TEXT", help="A caption; may be repeated. An empty one is none."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts", metavar="FILE", help="Captions: text with one a line, CSV, JSON or JSON lines."
        ),
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(metavar="S", help="Length (default: what it was trained on).")
    ] = None,
    guidance: Annotated[
        float, typer.Option(help="How far the caption is followed; 1 is the model's own word, 0 ignores it.")
    ] = 3.0,
    temperature: Annotated[float, typer.Option(help="Below 1 the likelier tokens are likelier still.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Draw from so many of the likeliest tokens; 0 takes all.")] = 250,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the likeliest tokens that together have this probability.")
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**62, help="Of the first prompt; the next has the next.")
    ] = 0,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:N (default: cuda where there is one).")
    ] = None,
    root: RootOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write music for captions, by a finished run, as sound files with a JSON file beside each."""
    from harness.evaluate.generate import frames_of, places, write_pieces
    from harness.evaluate.model import load_trained
    from ssmttm.generation import Sampling

    captions = _captions(prompt, prompts)
    files = places(out, len(captions))
    sampling = Sampling(
        temperature=temperature, top_k=None if top_k == 0 else top_k, top_p=top_p, guidance=guidance
    )
    trained = load_trained(Root(root or Path("runs")), run, device or _best_device())
    frames = frames_of(trained, seconds)
    if frames > trained.run.frames:
        trained_on = trained.run.frames / trained.manifest.codec.frame_rate
        warn(f"longer than the {trained_on:g} s it was trained on: nothing says how it goes on after them")
    done = []
    for path, piece in zip(
        files, write_pieces(trained, captions, files, frames, sampling, seed), strict=True
    ):
        if piece.scaled_by < 1:
            warn(f"{path}: scaled by {piece.scaled_by:.3g}, since it went beyond full scale")
        if not as_json:
            print_line(f"{path}: {piece.seconds:.2f} s, seed {piece.seed}")
        done.append({"path": str(path), **piece.model_dump(exclude={"file"})})
    if as_json:
        print_json({"run_id": trained.run.run_id, "pieces": done})


def _captions(given: list[str] | None, file: Path | None) -> list[str]:
    if bool(given) == bool(file):
        raise InputError("give either --prompt TEXT, as often as you like, or --prompts FILE")
    if file is None:
        return list(given or ())
    from ssmttm.corpus.caption_files import read_captions

    if captions := [row.caption for row in read_captions(file, named=False)]:
        return captions
    raise InputError(f"{file}: holds no caption; write one a line")


def _best_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
