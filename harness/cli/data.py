"""`ssmscale data`: corpora of music tokens, built and looked into.

How a corpus looks in a terminal: what was built, what is in it, and which tracks were left out and why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from harness.cli.options import JsonOption
from harness.cli.terminal import Sheet
from harness.common.console import console, print_json
from harness.common.format import counted

if TYPE_CHECKING:
    from ssmttm.corpus.describe import CorpusDescription
    from ssmttm.corpus.manifest import Manifest

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
    codec: Annotated[
        str,
        typer.Option(help="What makes the tokens: rvq (fitted to the music), encodec or dac (pretrained)."),
    ] = "rvq",
    codec_model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME_OR_FOLDER",
            help="encodec, dac: the model, on the hub or in a folder; facebook/encodec_24khz and "
            "descript/dac_44khz where not given. encodec_24khz is the encodec package's own copy.",
        ),
    ] = None,
    codebooks: Annotated[
        int, typer.Option(help="Codebooks of the codec; of a pretrained one the first so many.")
    ] = 4,
    codebook_size: Annotated[int | None, typer.Option(help="rvq: entries of a codebook; 1024.")] = None,
    sample_rate: Annotated[int | None, typer.Option(help="rvq: Hz; 16000.")] = None,
    device: Annotated[str, typer.Option(help="encodec, dac: cpu or cuda.")] = "cpu",
    transpose: Annotated[bool, typer.Option(help="bach: move each rendering by some semitones.")] = False,
    orchestrate: Annotated[bool, typer.Option(help="bach: give each rendering another ensemble.")] = False,
    versions: Annotated[int, typer.Option(help="bach: renderings of each score.")] = 1,
    seed: Annotated[int, typer.Option(help="Decides splits, limits and variety.")] = 0,
    workers: Annotated[
        int | None, typer.Option(help="Processes; all cores, or 2 on a GPU, where not given.")
    ] = None,
) -> None:
    """Make a corpus of music tokens: stopped at any point it goes on, finished it is left alone."""
    from harness.cli.display import StageProgress
    from harness.common.validation import validate
    from ssmttm.corpus.build import build_corpus
    from ssmttm.corpus.spec import BuildSpec

    fields: dict[str, Any] = {
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
        "codec_model": codec_model,
        "codebooks": codebooks,
        "transpose": transpose,
        "orchestrate": orchestrate,
        "versions": versions,
        "seed": seed,
    }
    of_rvq = {"codebook_size": codebook_size, "sample_rate": sample_rate}
    fields |= {key: value for key, value in of_rvq.items() if value is not None}
    spec = validate(BuildSpec, fields, "data build")
    with StageProgress(console) as progress:
        manifest = build_corpus(spec, out, workers, progress, device)
    print_built(console, out, manifest)


@data_app.command("inspect")
def data_inspect(
    corpus: Annotated[Path, typer.Argument(metavar="CORPUS")],
    as_json: JsonOption = False,
) -> None:
    """What a corpus holds: splits, hours, entropy a codebook, licences; checks the checksum of every file."""
    from ssmttm.corpus.describe import describe
    from ssmttm.corpus.manifest import load_manifest, verify_corpus

    verify_corpus(corpus, load_manifest(corpus))
    description = describe(corpus)
    if as_json:
        print_json(description.model_dump(mode="json"))
    else:
        print_corpus(console, corpus, description)


_NAMED = 10  # tracks named a reason; --json names all


def print_built(console: Console, corpus: Path, manifest: Manifest) -> None:
    """One line of a corpus that is finished, and the tracks that are not in it."""
    from ssmttm.corpus.describe import left_out

    hours = sum(manifest.hours(split) for split in manifest.splits)
    _say(
        console,
        f"{corpus}: {hours:.2f} hours in {len(manifest.splits)} splits, fingerprint {manifest.fingerprint[:12]}",
    )
    _print_left_out(console, left_out(manifest))


def print_corpus(console: Console, corpus: Path, about: CorpusDescription) -> None:
    """What a corpus holds."""
    codec = about.codec
    _say(console, f"{corpus}: {about.name}, from {about.source}, fingerprint {about.fingerprint[:12]}")
    _say(
        console,
        f"codec {codec.name} ({codec.fingerprint[:12]}): {codec.sample_rate:,} Hz, {codec.frame_rate:g} frames a "
        f"second, {counted(codec.n_codebooks, 'codebook')} of {codec.codebook_size:,} entries",
    )
    books = range(1, codec.n_codebooks + 1)
    columns = ["split", "clips", "tracks", "hours", "tokens"]
    columns += [f"bits {n}" for n in books] + [f"same {n}" for n in books]
    title = (
        f"clips of {about.clip_seconds:.2f} s, {about.frames:,} frames; a codebook's entropy in bits, and the share of "
        "its codes that are the same as the one before"
    )
    sheet = Sheet(title, columns, columns[1:])
    for name, split in about.splits.items():
        counts = (f"{split.clips:,}", f"{split.tracks:,}", f"{split.hours:.2f}", f"{split.tokens:,}")
        of_books = [*split.entropy_bits, *split.repeat_share]
        sheet.add_row(name, *counts, *(f"{value:.2f}" for value in of_books))
    sheet.print(console)
    for name, lines in (("licences", about.licences), ("captions, of the first clips", about.captions)):
        _say(console, f"{name}:")
        for line in lines:
            _say(console, f"  {line}")
    _print_left_out(console, about.skipped_reasons)


def _print_left_out(console: Console, reasons: Mapping[str, Sequence[str]]) -> None:
    if not reasons:
        return
    _say(console, f"left out: {counted(sum(map(len, reasons.values())), 'track')}")
    for reason, tracks in reasons.items():
        more = f" and {len(tracks) - _NAMED} more" if len(tracks) > _NAMED else ""
        _say(console, f"  {', '.join(tracks[:_NAMED])}{more}: {reason}")


def _say(console: Console, line: str) -> None:
    console.print(line, soft_wrap=True)
