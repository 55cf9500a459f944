"""`ssmscale generate`: hear what a finished run has learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from harness.options import JsonOption, RootOption
from harness.rundir import Root
from harness.terminal import console, print_json, warn
from ssmttm.errors import InputError


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
    from harness.generating import frames_of, is_longer, places, write_pieces
    from harness.trained import load_trained
    from ssmttm.generation import Sampling

    captions = _captions(prompt, prompts)
    files = places(out, len(captions))
    sampling = Sampling(
        temperature=temperature, top_k=None if top_k == 0 else top_k, top_p=top_p, guidance=guidance
    )
    trained = load_trained(Root(root or Path("runs")), run, device or _best_device())
    frames = frames_of(trained, seconds)
    if is_longer(trained, frames):
        trained_on = trained.run.frames / trained.manifest.codec.frame_rate
        warn(f"longer than the {trained_on:g} s it was trained on: nothing says how it goes on after them")
    done = []
    for path, piece in zip(
        files, write_pieces(trained, captions, files, frames, sampling, seed), strict=True
    ):
        if piece.scaled_by < 1:
            warn(f"{path}: scaled by {piece.scaled_by:.3g}, since it went beyond full scale")
        if not as_json:
            console.print(f"{path}: {piece.seconds:.2f} s, seed {piece.seed}", markup=False, soft_wrap=True)
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
