"""`ssmscale data`: build and inspect corpora of music tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from harness.cli.options import JsonOption, TargetOptions, expand_options
from harness.cli.terminal import Table
from harness.common.console import console, errors, print_json, print_line
from harness.common.format import counted
from ssmttm.errors import InputError

if TYPE_CHECKING:
    from harness.corpora.build import CorpusTasks
    from harness.dispatch.base import SubmitTarget
    from harness.submit.parts import PartStatus
    from ssmttm.corpus.describe import CorpusDescription
    from ssmttm.corpus.manifest import Grouping, Manifest, SetAside
    from ssmttm.corpus.spec import BuildSpec

data_app = typer.Typer(
    help="Build and inspect corpora of music tokens.", no_args_is_help=True, add_completion=False
)


@dataclass(frozen=True)
class SourceOptions:
    """Music of a corpus, its cuts and splits: fields of the BuildSpec."""

    source: Annotated[
        str, typer.Option(help="bach (music21's scores, rendered) or folder (your recordings).")
    ] = "bach"
    audio: Annotated[
        Path | None,
        typer.Option(
            help="folder: directory of sound files: wav, flac, aiff, au, mp3, mp2, ogg, oga, opus, aac, m4a, mp4, "
            "webm, mka. Damaged and silent ones are left out and named."
        ),
    ] = None
    captions: Annotated[
        Path | None,
        typer.Option(help="folder: captions as CSV, TSV, JSON, JSONL, Parquet, or a folder of song.json."),
    ] = None
    tags: Annotated[Path | None, typer.Option(help="folder: a Jamendo TSV whose tags become captions.")] = (
        None
    )
    licence: Annotated[str | None, typer.Option(help="folder: licence of tracks that name none.")] = None
    limit: Annotated[int | None, typer.Option(metavar="N", help="Most tracks to use.")] = None
    segment_seconds: Annotated[float, typer.Option(help="Length of a clip.")] = 10.0
    valid: Annotated[
        float | None, typer.Option(help="Share of the tracks held out for validation (default: 0.1).")
    ] = None
    test: Annotated[
        float | None, typer.Option(help="Share of the tracks held out for testing (default: 0).")
    ] = None
    splits: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|FOLDER|COLUMN",
            help="folder: a published split: files that list its tracks, or a column of the captions (default: their "
            "column split, if there is one). none draws the splits.",
        ),
    ] = None
    group_by: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="folder: tracks stay in one split if they share one of these: artist, album, content (of these, the "
            "same sound is used once) or a column of the captions; none for no grouping.",
        ),
    ] = "artist,album,content"
    near_duplicates: Annotated[
        bool,
        typer.Option(
            "--near-duplicates",
            help="Also keep recordings in one split that sound alike: copies in other forms.",
        ),
    ] = False
    near_threshold: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Likeness of near-duplicates, 0.5 to 1 (default: 0.85)."),
    ] = None


@dataclass(frozen=True)
class CodecOptions:
    """Codec of a corpus: fields of the BuildSpec."""

    codec: Annotated[
        str,
        typer.Option(help="Codec: rvq (fitted to the music), encodec or dac (pretrained)."),
    ] = "rvq"
    codec_model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME_OR_FOLDER",
            help="encodec, dac: a model on the hub or in a folder (default: facebook/encodec_24khz, "
            "descript/dac_44khz); encodec_24khz is the copy of the encodec package.",
        ),
    ] = None
    codebooks: Annotated[int, typer.Option(help="Codebooks; of a pretrained codec the first ones.")] = 4
    codebook_size: Annotated[int | None, typer.Option(help="rvq: entries of a codebook (default: 1024).")] = (
        None
    )
    sample_rate: Annotated[int | None, typer.Option(help="rvq: samples a second (default: 16000).")] = None


@dataclass(frozen=True)
class VarietyOptions:
    """Variety of renderings: fields of the BuildSpec."""

    transpose: Annotated[bool, typer.Option(help="bach: transpose each rendering by some semitones.")] = False
    orchestrate: Annotated[bool, typer.Option(help="bach: give each rendering another ensemble.")] = False
    versions: Annotated[int, typer.Option(help="bach: renderings of each score.")] = 1
    seed: Annotated[int, typer.Option(help="Seed of splits, limits and variety.")] = 0


@data_app.command(
    "build",
    epilog="Examples:\n\n"
    "ssmscale data build --out corpora/bach --limit 220 --segment-seconds 5.12\n\n"
    "ssmscale data build --out corpora/mine --source folder --audio recordings/ --captions captions.csv\n\n"
    "ssmscale data build --out corpora/mine --source folder --audio recordings/ --on slurm --cluster mine --parts 8",
)
@expand_options
def data_build(
    context: typer.Context,
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", metavar="DIR", help="Folder of the corpus; an unfinished one is continued."
        ),
    ],
    source: SourceOptions,
    codec: CodecOptions,
    *,
    device: Annotated[str, typer.Option(help="encodec, dac: cpu or cuda.")] = "cpu",
    variety: VarietyOptions,
    workers: Annotated[
        int | None, typer.Option(metavar="N", help="Without --on: processes (default: all cores).")
    ] = None,
    on: Annotated[
        str | None,
        typer.Option(
            "--on",
            metavar="WHERE",
            help="Divide the build into tasks: local runs them here; slurm submits a job for each and returns; ray "
            "builds by Ray Data in one job, or here without --cluster; auto is slurm with --cluster, else local "
            "(default: one process with --workers).",
        ),
    ] = None,
    parts: Annotated[
        int | None,
        typer.Option(
            "--parts",
            min=1,
            metavar="N",
            help="Tasks, of about equal hours (default: a core or GPU each, at most 16).",
        ),
    ] = None,
    machines: TargetOptions,
) -> None:
    """Build a corpus of music tokens.

    The same command goes on with a build that was stopped, shows the state of submitted tasks, and leaves a finished
    corpus alone.
    """
    from harness.cli.display import StageProgress
    from harness.cli.tasks import TaskOptions, task_target
    from harness.common.validation import validate
    from ssmttm.corpus.build import build_corpus
    from ssmttm.corpus.near import THRESHOLD
    from ssmttm.corpus.spec import BuildSpec

    # The BuildSpec knows the defaults of each codec.
    given = asdict(source) | asdict(codec) | asdict(variety)
    threshold = given.pop("near_threshold")
    if threshold is not None and not given["near_duplicates"]:
        raise InputError("--near-threshold is for --near-duplicates; give both")
    given["near_duplicates"] = (threshold or THRESHOLD) if given["near_duplicates"] else None
    spec = validate(
        BuildSpec, {key: value for key, value in given.items() if value is not None}, "data build"
    )
    target = task_target(context, TaskOptions(on=on, parts=parts), machines)
    if target is None:
        with StageProgress(console) as progress:
            manifest: Manifest | None = build_corpus(spec, out, workers, progress, device)
    elif workers is not None:
        raise InputError(f"--workers {workers}: is for a build in one process; with --on, --parts divides it")
    else:
        manifest = _build_by_tasks(spec, out, device, target, parts)
    if manifest is not None:
        _print_built(out, manifest)


def _build_by_tasks(
    spec: BuildSpec, out: Path, device: str, target: SubmitTarget, parts: int | None
) -> Manifest | None:
    """Build a corpus by tasks; None if they are in a scheduler's hands. Exits with 1 if a task failed."""
    from harness.cli.display import StageProgress
    from harness.corpora.build import build_by_ray_here, forget_tasks, open_tasks

    if target.on == "ray" and target.profile is None and target.ray_address is None:
        if parts is not None:
            raise InputError(f"--parts {parts}: a Ray of this machine takes all its cores; leave it out")
        with StageProgress(console) as progress:
            return build_by_ray_here(spec, out, device, progress)
    tasks = open_tasks(spec, out, device, target, parts)
    if not tasks.build.is_finished:
        if tasks.backend.outlives:
            _hand_over(tasks, out)
            return None
        _run_here(tasks)
    manifest = tasks.build.result()
    forget_tasks(tasks.build)
    return manifest


def _run_here(tasks: CorpusTasks) -> None:
    """Run tasks here, with a line for each that ends; exits with 1 if one failed."""
    from harness.submit.parts import PartState

    shown: set[str] = set()

    def show(states: Sequence[PartStatus]) -> None:
        for one in states:
            if one.state in {PartState.DONE, PartState.FAILED} and one.part.series_id not in shown:
                shown.add(one.part.series_id)
                console.print(f"[{len(shown)}/{len(states)}] {_described(one)}", highlight=False)

    states = tasks.run(show)
    show(states)
    if any(one.state is PartState.FAILED for one in states):
        errors.print("error: a part failed; the same command tries it again and keeps what is done")
        raise typer.Exit(1)


def _hand_over(tasks: CorpusTasks, out: Path) -> None:
    """Submit tasks, and print what was submitted and how far the others are."""
    from harness.submit.parts import PartState

    done, backend = tasks.hand_over(), tasks.backend
    for one in done.states:
        if one.state is not PartState.NEW:
            console.print(_described(one), highlight=False)
    if done.handles:
        jobs = ", ".join(dict.fromkeys(handle.job_id.split("_")[0] for handle in done.handles))
        count = counted(len(done.handles), "task")
        console.print(f"{out}: {count} submitted to {backend.where}: {backend.scheduler} job {jobs}")
    if done.waiting:
        errors.print(
            f"warning: {counted(done.waiting, 'task')} not submitted: {backend.where} takes no more jobs of yours "
            "(limits.jobs); repeat the command when some have ended"
        )
    console.print("the same command shows how far they are, and the corpus when it is finished")


def _described(one: PartStatus) -> str:
    """Return a line about a part."""
    from harness.submit.parts import PartState

    job = f" (job {one.job_id})" if one.job_id else ""
    why = f": {one.reason}" if one.reason else ""
    is_over = one.state in {PartState.DONE, PartState.FAILED}
    how_far = "" if is_over or not one.step else f", {counted(one.step, 'step')} done"
    return f"{one.part.series_id}: {one.state}{how_far}{job}{why}"


def _print_built(out: Path, manifest: Manifest) -> None:
    """Print a line about a finished corpus, and what was left out of it."""
    from ssmttm.corpus.describe import left_out

    hours = sum(manifest.hours(split) for split in manifest.splits)
    counts = f"{hours:.2f} hours in {len(manifest.splits)} splits"
    print_line(f"{out}: {counts}, fingerprint {manifest.fingerprint[:12]}")
    _print_grouping(manifest.grouping)
    _print_left_out(left_out(manifest), manifest.set_aside)


@data_app.command("inspect", epilog="Examples:\n\nssmscale data inspect corpora/bach")
@expand_options
def data_inspect(
    corpus: Annotated[Path, typer.Argument(metavar="CORPUS", help="Folder of a corpus.")],
    as_json: JsonOption = False,
) -> None:
    """Show the splits, codebooks and licences of a corpus.

    Checks the checksum of every file first.
    """
    from ssmttm.corpus.describe import describe
    from ssmttm.corpus.manifest import load_manifest, verify_corpus

    verify_corpus(corpus, load_manifest(corpus))
    description = describe(corpus)
    if as_json:
        print_json(description.model_dump(mode="json"))
    else:
        _print_corpus(corpus, description)


MOST_NAMED = 10
"""Tracks that are named for each kind of reason; `data inspect --json` names all."""


def _print_corpus(corpus: Path, about: CorpusDescription) -> None:
    """Print the description of a corpus."""
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
        f"clips of {about.clip_seconds:.2f} s, {about.frames:,} frames; of each codebook the entropy in bits, and the "
        "share of codes that repeat the one before"
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
    _print_grouping(about.grouping)
    _print_left_out(about.skipped_reasons, about.set_aside)


def _print_grouping(found: Grouping | None) -> None:
    """Print what was kept together in the splits, and what a published split did not keep together."""
    if found is None:
        print_line("groups: not recorded, since an older version built this corpus")
        return
    by = f", by {', '.join(found.by)}" if found.by else ""
    size = f"{counted(found.groups, 'group')} of {counted(found.tracks, 'track')}{by}"
    joined = f" (joined by {', '.join(found.largest_by)})" if found.largest_by else ""
    print_line(f"groups: {size}; the largest has {counted(found.largest, 'track')}{joined}")
    for kind, count in found.shared.items():
        print_line(f"  {kind}: {count:,} shared by two or more tracks")
    if found.twins:
        print_line(f"  content: {counted(found.twins, 'track')} left out, the same music as another")
    if found.published:
        print_line(f"splits: published ({found.published}), kept as they are")
    if found.leaking:
        counts = ", ".join(f"{number:,} by {kind}" for kind, number in found.leaking.items())
        print_line(f"LEAKS of the published split: {counts}")
        for leak in found.leaks[:MOST_NAMED]:
            sides = "; ".join(f"{split}: {', '.join(tracks)}" for split, tracks in leak.tracks.items())
            print_line(f"  {leak.by} {leak.value}".rstrip() + f": {sides}")


def _print_left_out(reasons: Mapping[str, Sequence[str]], rows: Sequence[SetAside]) -> None:
    """Print the tracks left out and the rows of captions set aside, by kind of reason.

    `KIND: details` differs from track to track in its details.
    """
    if reasons:
        print_line(f"left out: {counted(sum(map(len, reasons.values())), 'track')}")
    kinds: dict[str, list[str]] = {}
    for reason, tracks in reasons.items():
        kind, _, details = reason.partition(": ")
        kinds.setdefault(kind, []).extend(f"{track} ({details})" if details else track for track in tracks)
    for kind, tracks in sorted(kinds.items(), key=lambda item: -len(item[1])):
        more = f" and {len(tracks) - MOST_NAMED} more" if len(tracks) > MOST_NAMED else ""
        print_line(f"  {kind}: {counted(len(tracks), 'track')}: {', '.join(tracks[:MOST_NAMED])}{more}")
    if rows:
        print_line(f"set aside: {counted(sum(one.rows for one in rows), 'row')} of captions")
    for one in rows:
        more = f" and {one.rows - len(one.first):,} more" if one.rows > len(one.first) else ""
        print_line(f"  {one.file}, {', '.join(one.first)}{more}: {one.reason}")
