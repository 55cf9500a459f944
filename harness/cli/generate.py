"""`ssmscale generate`: sound files of captions, in this process or by tasks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from harness.cli.evaluate import SamplingOptions, sampling_target
from harness.cli.names import complete_run
from harness.cli.options import JsonOption, RootOption, TargetOptions, YesOption
from harness.cli.tasks import TaskOptions, do_by_tasks, open_tasks, print_states
from harness.common.console import print_json, print_line, warn
from harness.common.format import counted
from harness.dispatch.base import SubmitTarget
from harness.evaluate.tasks import Ended, Held
from harness.record.root import Root
from harness.submit.parts import PartState
from ssmttm.errors import InputError

if TYPE_CHECKING:
    from harness.evaluate.generate import SoundFile
    from harness.evaluate.pieces import PieceSet


def generate(
    context: typer.Context,
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
    tasks: TaskOptions,
    machines: TargetOptions,
    yes: YesOption = False,
    root: RootOption = None,
    as_json: JsonOption = False,
) -> None:
    """Generate music for captions with a finished run.

    Writes a sound file for each caption, and beside it a JSON file with all that makes it again. With --on tasks share
    the captions of a file; on a cluster the command returns, and the same command shows their state.
    """
    from harness.evaluate.generate import frames_of, places, write_pieces
    from harness.evaluate.model import load_trained
    from harness.evaluate.pieces import PieceSet
    from ssmttm.generation import Sampling

    target = sampling_target(context, tasks, machines, sampling)
    if target is not None and prompts is None:
        raise InputError(f"--on {tasks.on}: divides a file of captions among tasks; give --prompts FILE")
    captions = _captions(prompt, prompts)
    files = places(out, len(captions))
    draws = Sampling(**sampling.draws(), top_p=top_p)
    device = sampling.best_device() if target is None else "cpu"
    trained = load_trained(Root(root or Path("runs")), run, device)
    frames = frames_of(trained, seconds)
    if frames > trained.run.frames:
        trained_on = trained.run.frames / trained.manifest.codec.frame_rate
        warn(f"longer than the {trained_on:g} s that the run was trained on; the rest is untested")
    pieces: Iterable[SoundFile]
    if target is None:
        pieces = write_pieces(trained, captions, files, frames, draws, sampling.seed)
    else:
        wanted = PieceSet(trained, captions, files, frames, draws, sampling.seed)
        pieces = _generate_by_tasks(wanted, target, tasks, as_json=as_json, yes=yes)
    done = []
    for path, piece in zip(files, pieces, strict=True):
        if piece.scaled_by < 1:
            warn(f"{path}: scaled by {piece.scaled_by:.3g}, since it went beyond full scale")
        if not as_json:
            print_line(f"{path}: {piece.seconds:.2f} s, seed {piece.seed}")
        done.append({"path": str(path), **piece.model_dump(exclude={"file"})})
    if as_json:
        print_json({"run_id": trained.run.run_id, "pieces": done})


def _generate_by_tasks(
    wanted: PieceSet, target: SubmitTarget, tasks: TaskOptions, *, as_json: bool, yes: bool
) -> list[SoundFile]:
    """Have tasks write what no live job has; return the pieces if all are written, else print the tasks and exit."""
    whole = wanted.whole()
    backend, cluster = open_tasks(target, whole, wanted.places, tasks.jobs)
    blocks = wanted.blocks_left(cluster)
    nothing = Ended([], 0, Held([]))
    ended = do_by_tasks(whole, blocks, backend, cluster, tasks, yes=yes) if blocks else nothing
    kept = wanted.kept()
    written = [piece for piece in kept if piece is not None]
    if len(written) == len(kept):
        return written
    if as_json:
        states = [
            {
                "task": one.part.series_id,
                "state": one.state,
                "reason": one.reason,
                "job_id": one.job_id or None,
            }
            for one in ended.held.states
        ]
        document = {"run_id": wanted.trained.run.run_id, "written": len(written), "of": len(kept)}
        print_json({**document, "submitted": [handle.job_id for handle in ended.handles], "tasks": states})
    else:
        print_line(f"{len(written)} of {counted(len(kept), 'piece')} written")
        print_states(ended)
    has_failed = any(one.state is PartState.FAILED for one in ended.held.states)
    raise typer.Exit(1 if has_failed and not ended.handles else 0)


def _captions(given: list[str] | None, file: Path | None) -> list[str]:
    if bool(given) == bool(file):
        raise InputError("give either --prompt TEXT, once or more, or --prompts FILE")
    if file is None:
        return list(given or ())
    from ssmttm.corpus.caption_files import read_captions

    if captions := [row.caption for row in read_captions(file, named=False)]:
        return captions
    raise InputError(f"{file}: holds no caption; write one a line")
