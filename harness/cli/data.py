"""`ssmscale data`: build corpora of music tokens, and show what is in them and which tracks were left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from harness.cli.options import JsonOption, expand_options
from harness.cli.terminal import Table
from harness.common.console import console, print_json, print_line
from harness.common.format import counted

if TYPE_CHECKING:
    from ssmttm.corpus.describe import CorpusDescription
    from ssmttm.corpus.manifest import Manifest

data_app = typer.Typer(
    help="Build corpora of music tokens, and look into them.", no_args_is_help=True, add_completion=False
)


@dataclass(frozen=True)
class SourceOptions:
    """The music of a corpus, and how it is cut and split: the BuildSpec's fields of these names."""

    source: Annotated[
        str, typer.Option(help="bach (music21's scores, rendered) or folder (your own recordings).")
    ] = "bach"
    audio: Annotated[
        Path | None, typer.Option(help="folder: the directory of wav, flac, ogg and mp3 files.")
    ] = None
    captions: Annotated[
        Path | None, typer.Option(help="folder: captions by file, CSV, JSON, JSONL or Jamendo TSV.")
    ] = None
    tags: Annotated[Path | None, typer.Option(help="folder: a Jamendo TSV whose tags become captions.")] = (
        None
    )
    licence: Annotated[str | None, typer.Option(help="folder: licence of tracks that name none.")] = None
    limit: Annotated[int | None, typer.Option(help="Use at most so many tracks.")] = None
    segment_seconds: Annotated[float, typer.Option(help="Seconds of a clip.")] = 10.0
    valid: Annotated[float, typer.Option(help="Share of the tracks held out for validation.")] = 0.1
    test: Annotated[float, typer.Option(help="Share of the tracks held out for testing.")] = 0.0


@dataclass(frozen=True)
class CodecOptions:
    """The codec of a corpus: the BuildSpec's fields of these names."""

    codec: Annotated[
        str,
        typer.Option(help="What makes the tokens: rvq (fitted to the music), encodec or dac (pretrained)."),
    ] = "rvq"
    codec_model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME_OR_FOLDER",
            help="encodec, dac: the model, on the hub or in a folder; facebook/encodec_24khz and "
            "descript/dac_44khz where not given. encodec_24khz is the encodec package's own copy.",
        ),
    ] = None
    codebooks: Annotated[
        int, typer.Option(help="Codebooks of the codec; of a pretrained one the first so many.")
    ] = 4
    codebook_size: Annotated[int | None, typer.Option(help="rvq: entries of a codebook; 1024.")] = None
    sample_rate: Annotated[int | None, typer.Option(help="rvq: Hz; 16000.")] = None


@dataclass(frozen=True)
class VarietyOptions:
    """The variety of renderings: the BuildSpec's fields of these names."""

    transpose: Annotated[bool, typer.Option(help="bach: move each rendering by some semitones.")] = False
    orchestrate: Annotated[bool, typer.Option(help="bach: give each rendering another ensemble.")] = False
    versions: Annotated[int, typer.Option(help="bach: renderings of each score.")] = 1
    seed: Annotated[int, typer.Option(help="Decides splits, limits and variety.")] = 0


@data_app.command("build")
@expand_options
def data_build(
    out: Annotated[
        Path,
        typer.Option("--out", metavar="DIR", help="Where the corpus goes; built before, it is gone on with."),
    ],
    source: SourceOptions,
    codec: CodecOptions,
    *,
    device: Annotated[str, typer.Option(help="encodec, dac: cpu or cuda.")] = "cpu",
    variety: VarietyOptions,
    workers: Annotated[
        int | None, typer.Option(help="Processes; all cores, or 2 on a GPU, where not given.")
    ] = None,
) -> None:
    """Make a corpus of music tokens: stopped at any point it goes on, finished it is left alone."""
    from harness.cli.display import StageProgress
    from harness.common.validation import validate
    from ssmttm.corpus.build import build_corpus
    from ssmttm.corpus.spec import BuildSpec

    # An option that is not given is left to the BuildSpec, which knows what goes with which codec.
    given = asdict(source) | asdict(codec) | asdict(variety)
    spec = validate(
        BuildSpec, {key: value for key, value in given.items() if value is not None}, "data build"
    )
    with StageProgress(console) as progress:
        manifest = build_corpus(spec, out, workers, progress, device)
    _print_built(out, manifest)


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
        _print_corpus(corpus, description)


MOST_NAMED = 10
"""Tracks that are named for a reason; --json names all."""


def _print_built(corpus: Path, manifest: Manifest) -> None:
    """Print a line about a finished corpus, and the tracks that are not in it."""
    from ssmttm.corpus.describe import left_out

    hours = sum(manifest.hours(split) for split in manifest.splits)
    print_line(
        f"{corpus}: {hours:.2f} hours in {len(manifest.splits)} splits, fingerprint {manifest.fingerprint[:12]}"
    )
    _print_left_out(left_out(manifest))


def _print_corpus(corpus: Path, about: CorpusDescription) -> None:
    """Print what a corpus holds."""
    codec = about.codec
    print_line(f"{corpus}: {about.name}, from {about.source}, fingerprint {about.fingerprint[:12]}")
    print_line(
        f"codec {codec.name} ({codec.fingerprint[:12]}): {codec.sample_rate:,} Hz, {codec.frame_rate:g} frames a "
        f"second, {counted(codec.n_codebooks, 'codebook')} of {codec.codebook_size:,} entries"
    )
    books = range(1, codec.n_codebooks + 1)
    columns = ["split", "clips", "tracks", "hours", "tokens"]
    columns += [f"bits {n}" for n in books] + [f"same {n}" for n in books]
    title = (
        f"clips of {about.clip_seconds:.2f} s, {about.frames:,} frames; a codebook's entropy in bits, and the share of "
        "its codes that are the same as the one before"
    )
    table = Table(title, columns, columns[1:])
    for name, split in about.splits.items():
        counts = (f"{split.clips:,}", f"{split.tracks:,}", f"{split.hours:.2f}", f"{split.tokens:,}")
        of_books = [*split.entropy_bits, *split.repeat_share]
        table.add_row(name, *counts, *(f"{value:.2f}" for value in of_books))
    table.print(console)
    for name, lines in (("licences", about.licences), ("captions, of the first clips", about.captions)):
        print_line(f"{name}:")
        for line in lines:
            print_line(f"  {line}")
    _print_left_out(about.skipped_reasons)


def _print_left_out(reasons: Mapping[str, Sequence[str]]) -> None:
    if not reasons:
        return
    print_line(f"left out: {counted(sum(map(len, reasons.values())), 'track')}")
    for reason, tracks in reasons.items():
        more = f" and {len(tracks) - MOST_NAMED} more" if len(tracks) > MOST_NAMED else ""
        print_line(f"  {', '.join(tracks[:MOST_NAMED])}{more}: {reason}")
