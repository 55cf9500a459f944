"""The `ssmscale` command: a thin function a verb.

Exit status: 0 done, 1 some run failed, 2 the input is wrong. Errors are sentences on standard error; a traceback
only with --debug. With --json standard output holds one JSON document and nothing else.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from analysis.errors import InputError as AnalysisError
from harness import tables
from harness.cluster import this_machine
from harness.rundir import Root
from harness.status import RunState, RunStatus, StatusReader
from harness.study import load_study
from harness.submission import (
    ResolvedStudy,
    Submission,
    check_before_training,
    forgive,
    log_files,
    register,
    resolve,
    resolve_registered,
)
from harness.submission import (
    cancel as cancel_runs,
)
from ssmttm.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

    from analysis.document import FitDocument
    from analysis.points import CheckedPoints
    from harness.plan import Plan

app = typer.Typer(
    name="ssmscale",
    help="Scaling studies of state-space models against the Transformer: plan, train, track, fit, report.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
)
data_app = typer.Typer(help="Build corpora of music tokens, and look into them.", no_args_is_help=True)
app.add_typer(data_app, name="data")

# A pipe has no width of its own; tables are then as wide as they need to be.
console = Console(
    highlight=False, width=None if sys.stdout.isatty() else 250, soft_wrap=not sys.stdout.isatty()
)
errors = Console(stderr=True, highlight=False, soft_wrap=True)

StudyArgument = Annotated[
    str, typer.Argument(metavar="STUDY", help="A study's YAML file, or the name it was submitted under.")
]
RunsArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[RUN]...", help="Run ids; all runs where none is given.")
]
RootOption = Annotated[
    Path | None,
    typer.Option(
        "--root", envvar="SSMSCALE_ROOT", help="Where runs are kept (default: the study's root, else ./runs)."
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the study, such as training.batch=16."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
LawOption = Annotated[str, typer.Option(help="The law to fit.")]
DeltaOption = Annotated[float, typer.Option(help="Huber delta on log-loss residuals.")]
ReferenceOption = Annotated[
    str | None, typer.Option(metavar="ARCH", help="Architecture the others are compared with.")
]
ColumnOption = Annotated[
    list[str] | None, typer.Option("--column", metavar="A=B", help="Column B of the table is our column A.")
]
PointsOption = Annotated[
    Path | None,
    typer.Option("--points", metavar="FILE", help="Fit a CSV or Parquet table instead of a study."),
]
OptionalStudy = Annotated[str | None, typer.Argument(metavar="[STUDY]", help="A study; not with --points.")]


def main() -> None:
    """Entry point of `ssmscale`: turns errors into sentences and exit statuses."""
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    try:
        app()
    except (InputError, AnalysisError) as error:
        _fail(error, debug=debug, status=2)
    except ModuleNotFoundError as error:
        _fail(_missing_package(error), debug=debug, status=2, cause=error)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        _fail(error, debug=debug, status=1)
    except Exception as error:
        _fail(
            f"unexpected {type(error).__name__}: {error} (--debug shows where)",
            debug=debug,
            status=1,
            cause=error,
        )


def _fail(problem: Exception | str, *, debug: bool, status: int, cause: Exception | None = None) -> None:
    if debug:
        raise cause or (problem if isinstance(problem, Exception) else RuntimeError(problem))
    for line in str(problem).splitlines() or [type(problem).__name__]:
        errors.print(f"error: {line}", markup=False)
    sys.exit(status)


def _missing_package(error: ModuleNotFoundError) -> str:
    extras = {"pandas": "analysis", "scipy": "analysis", "plotly": "analysis", "matplotlib": "analysis"}
    extras |= {"jinja2": "analysis", "pyarrow": "analysis", "mlflow": "train", "torch": "train"}
    extras |= {"deepspeed": "train", "transformers": "train", "music21": "audio", "symusic": "audio"}
    extras |= {"sklearn": "audio", "soundfile": "audio", "pretty_midi": "audio", "soxr": "audio"}
    name = (error.name or "").split(".")[0]
    extra = extras.get(name, "all")
    return f"the package {name} is not installed; pip install 'ssmscale[{extra}]' brings it"


@app.callback()
def _globals(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """Read by main() before anything can go wrong; declared here for --help."""


# -- the study: plan, submit, watch, steer


@app.command()
def plan(
    study: StudyArgument,
    root: RootOption = None,
    changes: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """What is left to train and what it will cost; writes nothing."""
    resolved = _open(study, root, changes)
    made = _plan(resolved)
    if as_json:
        _print_json(made.as_json())
    else:
        tables.print_plan(console, made)


@app.command()
def submit(
    study: StudyArgument,
    on: Annotated[
        str, typer.Option("--on", metavar="local", help="Dispatcher: local trains here, in the foreground.")
    ],
    root: RootOption = None,
    changes: SetOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, show the plan, train nothing.")
    ] = False,
) -> None:
    """Train what is missing of a study; what is finished is reused, what is interrupted goes on."""
    if on != "local":
        raise InputError(f"--on {on}: there is no such dispatcher here; local is the one there is")
    resolved = _open(study, root, changes)
    check_before_training(resolved)
    made = _plan(resolved)
    if dry_run:
        tables.print_plan(console, made)
        return
    register(resolved)
    rows = _train(resolved, made)
    _conclude(resolved, rows)


@app.command()
def status(
    study: StudyArgument,
    root: RootOption = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show it again every two seconds until all is over.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Where every run of a study stands."""
    resolved = _registered(study, root)
    if watch and not as_json:
        tables.watch_status(console, lambda: _rows(resolved), resolved.study.name)
        return
    rows = _rows(resolved)
    if as_json:
        _print_json(tables.status_document(resolved.study.name, rows))
    else:
        tables.print_status(console, resolved.study.name, rows)


@app.command()
def logs(
    study: StudyArgument,
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run id, or its first digits.")],
    root: RootOption = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on as more is written.")] = False,
) -> None:
    """What a run's workers printed."""
    resolved = _registered(study, root)
    row = _choose(_rows(resolved), [run])[0]
    files = log_files(resolved.root, row)
    if not files:
        raise InputError(f"run {row.run_id} has no logs: nothing has trained it yet")
    tables.print_logs(console, files, follow=follow)


@app.command()
def cancel(study: StudyArgument, runs: RunsArgument = None, root: RootOption = None) -> None:
    """Cancel runs of a study that are not over; others of the same trunk go on."""
    resolved = _registered(study, root)
    concerned = cancel_runs(resolved.root, resolved.study.name, _choose(_rows(resolved), runs))
    console.print(f"{len(concerned)} runs cancelled")


@app.command()
def retry(study: StudyArgument, runs: RunsArgument = None, root: RootOption = None) -> None:
    """Forget failures and cancellations, then train what is missing here."""
    resolved = _registered(study, root)
    concerned = forgive(resolved.root, resolved.study.name, _choose(_rows(resolved), runs))
    console.print(f"{len(concerned)} runs to be tried again")
    if concerned:
        check_before_training(resolved)
        _conclude(resolved, _train(resolved, _plan(resolved)))


@app.command()
def sync(study: StudyArgument, root: RootOption = None) -> None:
    """Replay the journals into MLflow and settle runs that nobody trains any more."""
    resolved = _registered(study, root)
    rows = _rows(resolved)
    _tracker(resolved).mirror(rows, settle=True)
    console.print(f"{sum(row.state is RunState.DONE for row in rows)} finished runs are in {_uri(resolved)}")


# -- what came out: points, fit, report


@app.command()
def points(
    study: StudyArgument,
    root: RootOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write CSV or Parquet, by the name's ending.")
    ] = None,
) -> None:
    """The table of finished runs, a row a run, as CSV."""
    frame = _points_frame(_registered(study, root))
    if out is None:
        sys.stdout.write(frame.to_csv(index=False))
    elif out.suffix == ".parquet":
        frame.to_parquet(out, index=False)
    elif out.suffix == ".csv":
        frame.to_csv(out, index=False)
    else:
        raise InputError(f"--out {out}: ends in neither .csv nor .parquet")


@app.command()
def fit(
    study: OptionalStudy = None,
    points_file: PointsOption = None,
    law: LawOption = "chinchilla",
    delta: DeltaOption = 1e-3,
    reference: ReferenceOption = None,
    columns: ColumnOption = None,
    root: RootOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fit a scaling law to each architecture and compare them at equal loss."""
    checked, document, _ = _fit(study, points_file, law, delta, reference, columns, root)
    if as_json:
        _print_json(document.model_dump(mode="json"))
    else:
        tables.print_fit(console, checked, document)


@app.command()
def report(
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Where report.html, figures/ and fit.json go.")
    ],
    study: OptionalStudy = None,
    points_file: PointsOption = None,
    law: LawOption = "chinchilla",
    delta: DeltaOption = 1e-3,
    reference: ReferenceOption = None,
    columns: ColumnOption = None,
    root: RootOption = None,
) -> None:
    """Write the report: one self-contained HTML page with the curves, the comparison and every warning."""
    from analysis.report import Provenance, write_report

    checked, document, resolved = _fit(study, points_file, law, delta, reference, columns, root)
    provenance = Provenance(command=_command_line(), commit=_commit())
    page = write_report(
        checked,
        document,
        out,
        study=resolved.study.name if resolved else None,
        provenance=provenance,
        mlflow_links=_tracker(resolved).links() if resolved else None,
    )
    console.print(str(page.absolute()), markup=False)


@app.command()
def doctor(root: RootOption = None, as_json: JsonOption = False) -> None:
    """What of this machine works, and what to do about the rest."""
    from harness.doctor import examine

    findings = examine(root or Path("runs"))
    if as_json:
        _print_json({"checks": [finding.model_dump() for finding in findings]})
    else:
        tables.print_doctor(console, findings)
    if any(finding.needed and not finding.works for finding in findings):
        raise typer.Exit(1)


# -- data


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
        _print_json(description.model_dump(mode="json"))
    else:
        tables.print_corpus(console, corpus, description)


# -- what the verbs share


def _open(study: str, root: Path | None, changes: Sequence[str] | None) -> ResolvedStudy:
    """A study from its YAML, or by the name it was submitted under."""
    path = Path(study)
    if path.suffix in {".yaml", ".yml"} or path.is_file():
        loaded = load_study(path, changes or ())
        return resolve(loaded, Root(root or loaded.root or Path("runs")), study)
    found = resolve_registered(Root(root or Path("runs")), study) if _is_name(study) else None
    if found is None:
        raise InputError(
            f"{study}: neither a file nor the name of a study under {(root or Path('runs')) / 'studies'}"
        )
    if changes:
        raise InputError(f"{study}: --set changes a YAML file; this is a study as it was submitted")
    return found


def _registered(study: str, root: Path | None) -> ResolvedStudy:
    """A study as it was submitted; the YAML itself where it was not."""
    path = Path(study)
    if path.suffix in {".yaml", ".yml"} or path.is_file():
        loaded = load_study(path)
        place = Root(root or loaded.root or Path("runs"))
        return resolve_registered(place, loaded.name) or resolve(loaded, place, study)
    return _open(study, root, None)


def _is_name(study: str) -> bool:
    return "/" not in study and not study.startswith(".")


def _plan(resolved: ResolvedStudy) -> Plan:
    from harness.plan import make_plan

    try:
        return make_plan(resolved.study, resolved.points, resolved.corpus, resolved.root, this_machine())
    except InputError as error:
        raise InputError(f"{resolved.where}: {error}") from error


def _rows(resolved: ResolvedStudy) -> list[RunStatus]:
    return StatusReader(resolved.root, resolved.study.name).read(resolved.points)


def _choose(rows: list[RunStatus], wanted: Sequence[str] | None) -> list[RunStatus]:
    if not wanted:
        return rows
    chosen = []
    for name in wanted:
        found = [row for row in rows if row.run_id.startswith(name)]
        if len(found) != 1:
            kind = "no run" if not found else f"{len(found)} runs"
            raise InputError(f"{name}: {kind} of this study begins so; see `ssmscale status`")
        chosen += found
    return chosen


def _train(resolved: ResolvedStudy, made: Plan) -> list[RunStatus]:
    from harness.dispatch.local import LocalDispatcher
    from harness.progress import StudyProgress
    from harness.tracking import MirrorThread

    rows = _rows(resolved)
    if not made.missing and not any(row.state in {RunState.RUNNING, RunState.QUEUED} for row in rows):
        return rows
    folder = resolved.root.study(resolved.study.name)
    dispatcher = LocalDispatcher(this_machine(), folder / "logs", resolved.study.resources.jobs)
    mirror = MirrorThread(_uri(resolved), resolved.study.name, resolved.root)
    submission = Submission(resolved, made, dispatcher, "local")
    with _stoppable(), StudyProgress(console) as progress:
        mirror.start()
        try:

            def on_progress(now: Sequence[RunStatus]) -> None:
                progress.show(now)
                mirror.show(now)

            rows = submission.run(on_progress)
        except KeyboardInterrupt:
            errors.print("stopping: workers save what they have")
            dispatcher.close()
            mirror.finish(_rows(resolved))
            errors.print("stopped; the same command goes on from here")
            sys.exit(130)
        finally:
            dispatcher.close()
        mirror.finish(rows)
    return rows


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM ends a submission as Ctrl-C does: in order, with everything saved."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _conclude(resolved: ResolvedStudy, rows: Sequence[RunStatus]) -> None:
    tables.print_summary(console, resolved.study.name, rows)
    if any(row.state is RunState.FAILED for row in rows):
        raise typer.Exit(1)


def _uri(resolved: ResolvedStudy) -> str:
    from harness.tracking import default_uri

    return resolved.study.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or default_uri(resolved.root)


def _tracker(resolved: ResolvedStudy) -> Any:
    from harness.tracking import Tracker

    return Tracker(_uri(resolved), resolved.study.name, resolved.root)


def _points_frame(resolved: ResolvedStudy) -> pd.DataFrame:
    from dataclasses import asdict, fields

    import pandas as pd

    from harness.tracking import Point

    rows = _rows(resolved)
    tracker = _tracker(resolved)
    tracker.mirror(rows, settle=True)
    held = tracker.points([row.run_id for row in rows])
    return pd.DataFrame([asdict(point) for point in held], columns=[field.name for field in fields(Point)])


def _fit(
    study: str | None,
    points_file: Path | None,
    law: str,
    delta: float,
    reference: str | None,
    columns: Sequence[str] | None,
    root: Path | None,
) -> tuple[CheckedPoints, FitDocument, ResolvedStudy | None]:
    from analysis.document import fit_points
    from analysis.points import build_frame, check_points, read_table

    if (study is None) == (points_file is None):
        raise InputError("give either a STUDY or --points FILE, and not both")
    names = {}
    for pair in columns or ():
        ours, equals, theirs = pair.partition("=")
        if not equals or not ours or not theirs:
            raise InputError(f"--column {pair}: is not OURS=THEIRS, such as n_params=params")
        names[ours] = theirs
    resolved = None
    if points_file is not None:
        frame = read_table(points_file, names)
    else:
        assert study is not None
        resolved = _registered(study, root)
        table = _points_frame(resolved)
        cells = list(enumerate(table.itertuples(index=False, name=None), start=1))
        frame = build_frame(list(table.columns), cells, f"study {resolved.study.name}")
    checked = check_points(frame)
    return checked, fit_points(checked, law=law, delta=delta, reference=reference), resolved


def _command_line() -> str:
    import shlex

    return shlex.join(["ssmscale", *sys.argv[1:]])


def _commit() -> str | None:
    from harness.provenance import commit

    return commit()


def _print_json(document: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(document, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
