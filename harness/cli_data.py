"""`ssmscale data`: corpora of music tokens, built and looked into."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from harness import tables
from harness.options import JsonOption
from harness.terminal import console, print_json

data_app = typer.Typer(help="Build corpora of music tokens, and look into them.", no_args_is_help=True)


@data_app.command("build")
def data_build(
    out: Annotated[
        Path,
        typer.Option("--out", metavar="DIR", help="Where the corpus goes; built before, it is gone on with."),
    ],
    source: Annotated[
        str, typer.Option(help="bach (music21's scores, rendered) or folder (your own recordings).")
    ] = "bach",
    audio: Annotated[
        Path | None, typer.Option(help="folder: the directory of wav, flac, ogg and mp3 files.")
    ] = None,
    captions: Annotated[
        Path | None, typer.Option(help="folder: captions by file, CSV, JSON, JSONL or Jamendo TSV.")
    ] = None,
    tags: Annotated[
        Path | None, typer.Option(help="folder: a Jamendo TSV whose tags become captions.")
    ] = None,
    licence: Annotated[str | None, typer.Option(help="folder: licence of tracks that name none.")] = None,
    limit: Annotated[int | None, typer.Option(help="Use at most so many tracks.")] = None,
    segment_seconds: Annotated[float, typer.Option(help="Seconds of a clip.")] = 10.0,
    valid: Annotated[float, typer.Option(help="Share of the tracks held out for validation.")] = 0.1,
    test: Annotated[float, typer.Option(help="Share of the tracks held out for testing.")] = 0.0,
    codec: Annotated[str, typer.Option(help="Codec that makes the tokens.")] = "rvq",
    codebooks: Annotated[int, typer.Option(help="Codebooks of the codec.")] = 4,
    codebook_size: Annotated[int, typer.Option(help="Entries of a codebook.")] = 1024,
    sample_rate: Annotated[int, typer.Option(help="Hz.")] = 16000,
    transpose: Annotated[bool, typer.Option(help="bach: move each rendering by some semitones.")] = False,
    orchestrate: Annotated[bool, typer.Option(help="bach: give each rendering another ensemble.")] = False,
    versions: Annotated[int, typer.Option(help="bach: renderings of each score.")] = 1,
    seed: Annotated[int, typer.Option(help="Decides splits, limits and variety.")] = 0,
    workers: Annotated[int | None, typer.Option(help="Processes; all cores where not given.")] = None,
) -> None:
    """Make a corpus of music tokens: stopped at any point it goes on, finished it is left alone."""
    from harness.progress import StageProgress
    from harness.validation import validate
    from ssmttm.corpus.build import build_corpus
    from ssmttm.corpus.spec import BuildSpec

    fields = {
        "source": source,
        "audio": audio,
        "captions": captions,
        "tags": tags,
        "licence": licence,
        "limit": limit,
        "segment_seconds": segment_seconds,
        "valid": valid,
        "test": test,
        "codec": codec,
        "codebooks": codebooks,
        "codebook_size": codebook_size,
        "sample_rate": sample_rate,
        "transpose": transpose,
        "orchestrate": orchestrate,
        "versions": versions,
        "seed": seed,
    }
    spec = validate(BuildSpec, fields, "data build")
    with StageProgress(console) as progress:
        manifest = build_corpus(spec, out, workers or len(os.sched_getaffinity(0)), progress)
    hours = sum(manifest.hours(split) for split in manifest.splits)
    console.print(
        f"{out}: {hours:.2f} hours in {len(manifest.splits)} splits, fingerprint {manifest.fingerprint[:12]}"
    )


@data_app.command("inspect")
def data_inspect(
    corpus: Annotated[Path, typer.Argument(metavar="CORPUS")],
    as_json: JsonOption = False,
) -> None:
    """What a corpus holds: splits, hours, entropy a codebook, licences; checks every shard's checksum."""
    from ssmttm.corpus.describe import describe
    from ssmttm.corpus.manifest import load_manifest, verify_corpus

    verify_corpus(corpus, load_manifest(corpus))
    description = describe(corpus)
    if as_json:
        print_json(description.model_dump(mode="json"))
    else:
        tables.print_corpus(console, corpus, description)
