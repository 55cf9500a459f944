"""The verbs of trained models: `ssmscale evaluate` and `ssmscale generate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness.cli.names import complete_run
from harness.cli.options import DeviceOption, JsonOption, RootOption, RunsArgument, StudyArgument
from harness.cli.terminal import Table, plain_text
from harness.common.console import Stopped, console, errors, print_json, print_line, stoppable, warn
from harness.common.disk import write_atomically
from harness.common.format import counted
from harness.record.points import check_output
from harness.record.registry import registered
from harness.record.root import Root
from harness.record.scores import HELD_OUT, EvaluationRow, as_csv, evaluation_rows
from harness.record.status import RunState, RunStatus
from harness.submit.monitor import begun, choose
from ssmttm.errors import InputError

if TYPE_CHECKING:
    from harness.evaluate.evaluator import Evaluator
    from harness.evaluate.request import Evaluated


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
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"


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
    study: StudyArgument,
    runs: RunsArgument = None,
    *,
    options: EvaluateOptions,
    sampling: SamplingOptions,
    root: RootOption = None,
    as_json: JsonOption = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="F.csv", help="Write every result of the study as CSV."),
    ] = None,
) -> None:
    """Measure finished runs: held-out loss, quality of their music.

    The music is generated for captions and compared with recordings.
    """
    check_output(out, ".csv")
    resolved = registered(study, root)
    chosen = _finished(choose(begun(resolved), runs), named=bool(runs))
    from harness.evaluate.evaluator import Evaluator
    from harness.evaluate.request import Request
    from harness.tracking.sync import bring_up_to_date

    request = Request(
        **asdict(options), **sampling.draws(), seed=sampling.seed, device=sampling.best_device()
    )
    done: list[Evaluated] = []
    with errors.status("opening the study") as shown, stoppable():
        try:
            evaluator = Evaluator.of(resolved, request, shown.update, warn)
            for number, row in enumerate(chosen, 1):
                shown.update(f"run {number} of {len(chosen)}: {row.run_id}")
                done.append(evaluator.evaluate(row.run_id))
        except KeyboardInterrupt as interrupt:
            raise Stopped from interrupt
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
        _print(resolved.study.name, evaluator, chosen, done, rows)
    if any(one.outcome in {"busy", "impossible"} for one in done):
        raise typer.Exit(1)


def _finished(rows: Sequence[RunStatus], *, named: bool) -> list[RunStatus]:
    """Return the finished rows; raises InputError if there are none, or if a row that was named is not finished."""
    done = [row for row in rows if row.state is RunState.DONE]
    left = [row for row in rows if row.state is not RunState.DONE]
    if left and (named or not done):
        raise InputError(f"run {left[0].run_id}: is {left[0].state}; only finished runs can be evaluated")
    return done


def _print(
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


def generate(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            help="A finished run: its id, its first digits, or its folder.",
            autocompletion=complete_run,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="F.wav", help="File to write, or a folder for several prompts."),
    ],
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt", "-p", metavar="TEXT", help="A caption, or an empty one for none; repeatable."
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts", metavar="FILE", help="Captions: text with one a line, CSV, JSON or JSON lines."
        ),
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(metavar="S", help="Length (default: that of the training clips).")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(metavar="P", help="Draw from the likeliest tokens of this total probability."),
    ] = None,
    *,
    sampling: SamplingOptions,
    root: RootOption = None,
    as_json: JsonOption = False,
) -> None:
    """Generate music for captions with a finished run.

    Writes a sound file for each caption, and beside it a JSON file with all that makes it again.
    """
    from harness.evaluate.generate import frames_of, places, write_pieces
    from harness.evaluate.model import load_trained
    from ssmttm.generation import Sampling

    captions = _captions(prompt, prompts)
    files = places(out, len(captions))
    draws = Sampling(**sampling.draws(), top_p=top_p)
    trained = load_trained(Root(root or Path("runs")), run, sampling.best_device())
    frames = frames_of(trained, seconds)
    if frames > trained.run.frames:
        trained_on = trained.run.frames / trained.manifest.codec.frame_rate
        warn(f"longer than the {trained_on:g} s that the run was trained on; the rest is untested")
    done = []
    pieces = write_pieces(trained, captions, files, frames, draws, sampling.seed)
    for path, piece in zip(files, pieces, strict=True):
        if piece.scaled_by < 1:
            warn(f"{path}: scaled by {piece.scaled_by:.3g}, since it went beyond full scale")
        if not as_json:
            print_line(f"{path}: {piece.seconds:.2f} s, seed {piece.seed}")
        done.append({"path": str(path), **piece.model_dump(exclude={"file"})})
    if as_json:
        print_json({"run_id": trained.run.run_id, "pieces": done})


def _captions(given: list[str] | None, file: Path | None) -> list[str]:
    if bool(given) == bool(file):
        raise InputError("give either --prompt TEXT, once or more, or --prompts FILE")
    if file is None:
        return list(given or ())
    from ssmttm.corpus.caption_files import read_captions

    if captions := [row.caption for row in read_captions(file, named=False)]:
        return captions
    raise InputError(f"{file}: holds no caption; write one a line")
