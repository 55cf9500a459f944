"""The `ssmscale` command: a thin function a verb.

Exit status: 0 done, 1 some run failed, 2 the input is wrong. Errors are sentences on standard error; a traceback
only with --debug. With --json standard output holds one JSON document and nothing else.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from analysis.errors import InputError as AnalysisError
from harness import submission, tables
from harness.cli_data import data_app
from harness.cli_keep import export_study, import_bundle, prune
from harness.cli_serve import serve
from harness.cluster import this_machine
from harness.disk import DiskFull
from harness.dispatch.slurm_queue import SchedulerGone
from harness.foreground import Stopped, train_here
from harness.opening import begun, choose, jobs_of, open_study, registered, rows_of
from harness.options import (
    ClusterOption,
    ColumnOption,
    DeltaOption,
    JsonOption,
    LawOption,
    OptionalStudy,
    PointsOption,
    ReferenceOption,
    RootOption,
    RunsArgument,
    SetOption,
    StudyArgument,
)
from harness.plan import make_plan
from harness.profile import Profile, load_profile, profile_names
from harness.provenance import installed_version
from harness.remote import cancel_jobs_of, check_cluster, submit_to_slurm
from harness.status import RunState, RunStatus, StatusReader
from harness.submission import ResolvedStudy
from harness.syncing import bring_up_to_date, keep_report, kept_by, replay, warn
from harness.terminal import console, counted, errors, print_json
from ssmttm.errors import InputError

if TYPE_CHECKING:
    from analysis.document import FitDocument
    from analysis.points import CheckedPoints
    from harness.plan import Plan
    from harness.tracking import Tracker

app = typer.Typer(
    name="ssmscale",
    help="Scaling studies of state-space models against the Transformer: plan, train, track, fit, report.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
)
app.add_typer(data_app, name="data")


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
    except SchedulerGone as gone:
        _fail(f"SLURM: {gone}", debug=debug, status=1, cause=gone)
    except Stopped:
        errors.print("stopped; the same command goes on from here")
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
        _fail(f"{error.filename}: {error.strerror}", debug=debug, status=2, cause=error)
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
    extras |= {"psycopg": "serve", "psycopg2": "serve", "flask_wtf": "serve"}
    extras |= {"deepspeed": "train", "transformers": "train", "music21": "audio", "symusic": "audio"}
    extras |= {"sklearn": "audio", "soundfile": "audio", "pretty_midi": "audio", "soxr": "audio"}
    name = (error.name or "").split(".")[0]
    extra = extras.get(name, "all")
    return f"the package {name} is not installed; pip install 'ssmscale[{extra}]' brings it"


def _print_version(wanted: bool) -> None:
    if wanted:
        console.print(f"ssmscale {installed_version('ssmscale')}")
        raise typer.Exit


@app.callback()
def _globals(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Read by main() before anything can go wrong; declared here for --help."""


# -- the study: plan, submit, watch, steer


@app.command()
def plan(
    study: StudyArgument,
    root: RootOption = None,
    changes: SetOption = None,
    cluster: ClusterOption = None,
    as_json: JsonOption = False,
) -> None:
    """What is left to train and what it will cost; trains nothing."""
    resolved = open_study(study, root, changes)
    made = _plan(resolved, load_profile(cluster) if cluster else None)
    if as_json:
        print_json(made.as_json())
    else:
        tables.print_plan(console, made)


@app.command()
def submit(
    study: StudyArgument,
    on: Annotated[
        str,
        typer.Option(
            "--on",
            metavar="local|slurm|auto",
            help="local trains here, in the foreground; slurm hands over and returns; auto takes slurm where a cluster "
            "is named.",
        ),
    ],
    root: RootOption = None,
    changes: SetOption = None,
    cluster: ClusterOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, show the plan, train nothing.")
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="Do not ask, however many GPU-hours the profile wants confirmed.")
    ] = False,
) -> None:
    """Train what is missing of a study; what is finished is reused, what is interrupted goes on."""
    profile = _profile(on, cluster)
    resolved = open_study(study, root, changes)
    submission.check_before_training(resolved)
    made = _plan(resolved, profile)  # whatever is wrong with the resources is said before anything is written
    if dry_run:
        tables.print_plan(console, made)
        return
    if profile is not None:
        check_cluster(profile, resolved)
        _confirm(made, profile, yes=yes)
    submission.register(resolved)
    submission.keep_plan(resolved.root, made)
    _hand_over(resolved, made, profile)


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
    resolved = registered(study, root)
    if watch and not as_json:
        tables.watch_status(console, lambda: rows_of(resolved), resolved.study.name)
        return
    reader = StatusReader(resolved.root, resolved.study.name)
    rows = reader.read(resolved.points, jobs=jobs_of(resolved))
    if as_json:
        print_json(tables.status_document(resolved.study.name, rows, reader.notes))
    else:
        tables.print_status(console, resolved.study.name, rows)
        tables.print_notes(errors, reader.notes)


@app.command()
def logs(
    study: StudyArgument,
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run id, or its first digits.")],
    root: RootOption = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on as more is written.")] = False,
) -> None:
    """What a run's workers printed."""
    resolved = registered(study, root)
    row = choose(rows_of(resolved), [run])[0]
    files = submission.log_files(resolved.root, row)
    if not files:
        raise InputError(f"run {row.run_id} has no logs: nothing has trained it yet")
    tables.print_logs(console, files, follow=follow)


@app.command()
def cancel(study: StudyArgument, runs: RunsArgument = None, root: RootOption = None) -> None:
    """Cancel runs of a study that are not over; others of the same trunk go on."""
    resolved = registered(study, root)
    rows = rows_of(resolved)
    concerned = submission.cancel(resolved.root, resolved.study.name, choose(rows, runs))
    ended = cancel_jobs_of(resolved, rows)
    if ended:
        console.print(f"{counted(len(ended), 'job')} taken from SLURM: {', '.join(ended)}")
    console.print(f"{counted(len(concerned), 'run')} cancelled")


@app.command()
def retry(
    study: StudyArgument,
    runs: RunsArgument = None,
    root: RootOption = None,
    on: Annotated[str, typer.Option("--on", metavar="local|slurm|auto", help="As for submit.")] = "auto",
    cluster: ClusterOption = None,
) -> None:
    """Forget failures and cancellations, then submit what is missing."""
    profile = _profile(on, cluster)
    resolved = registered(study, root)
    submission.check_before_training(resolved)
    if profile is not None:
        check_cluster(profile, resolved)
    concerned = submission.forgive(resolved.root, resolved.study.name, choose(rows_of(resolved), runs))
    console.print(f"{counted(len(concerned), 'run')} to be tried again")
    if concerned:
        _hand_over(resolved, _plan(resolved, profile), profile)


@app.command()
def sync(study: StudyArgument, root: RootOption = None) -> None:
    """Check MLflow against the journals: send what it lacks, merge what is there twice, settle what nobody trains."""
    resolved = registered(study, root)
    rows = begun(resolved)
    tracker, done = replay(resolved, rows)
    warn(done.notes)
    if done.merged:
        console.print(f"{counted(done.merged, 'run')} that were there twice merged into the oldest")
    if done.settled:
        console.print(f"{counted(done.settled, 'run')} settled that the study lists no more")
    console.print(kept_by(tracker, rows))


app.command()(prune)

# -- what came out: export, import, points, fit, report

app.command("export")(export_study)
app.command("import")(import_bundle)


@app.command()
def points(
    study: StudyArgument,
    root: RootOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write CSV or Parquet, by the name's ending.")
    ] = None,
    on_the_way: Annotated[
        bool,
        typer.Option("--all", help="Add the evaluations made on the way, as rows with annealed=False."),
    ] = False,
) -> None:
    """The table of finished runs, a row a run, as CSV: from the journals, which MLflow is brought up to first."""
    from harness.points_table import check_ending, points_of, write_table

    check_ending(out)
    resolved = registered(study, root)
    rows = begun(resolved)
    bring_up_to_date(resolved, rows)
    write_table(points_of(rows, resolved.root, on_the_way=on_the_way), out, sys.stdout)


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
    from analysis.terminal import print_fit

    fitted = _fit(study, points_file, law, delta, reference, columns, root)
    if as_json:
        print_json(fitted.document.model_dump(mode="json"))
    else:
        print_fit(console, fitted.checked, fitted.document)


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

    fitted = _fit(study, points_file, law, delta, reference, columns, root)
    resolved, tracker = fitted.resolved, fitted.tracker
    provenance = Provenance(command=_command_line(), commit=_commit())
    page = write_report(
        fitted.checked,
        fitted.document,
        out,
        study=resolved.study.name if resolved else None,
        provenance=provenance,
        mlflow_links=tracker.links() if tracker else None,
    )
    if resolved is not None:
        keep_report(resolved, fitted.rows, out, tracker)
    console.print(str(page.absolute()), markup=False)


app.command()(serve)


@app.command()
def doctor(root: RootOption = None, as_json: JsonOption = False) -> None:
    """What of this machine works, and what to do about the rest."""
    from harness.doctor import examine

    findings = examine(root or Path("runs"))
    if as_json:
        print_json({"checks": [finding.model_dump() for finding in findings]})
    else:
        tables.print_doctor(console, findings)
    if any(finding.needed and not finding.works for finding in findings):
        raise typer.Exit(1)


# -- what several verbs share


def _profile(on: str, cluster: str | None) -> Profile | None:
    """The cluster a submission goes to; None for this machine."""
    if on not in {"local", "slurm", "auto"}:
        raise InputError(f"--on {on}: there is no such dispatcher; there are local, slurm and auto")
    if on == "local" or (on == "auto" and cluster is None):
        return None
    if cluster is None:
        raise InputError(
            f"--on slurm: name the cluster with --cluster; there are {', '.join(profile_names())}"
        )
    return load_profile(cluster)


def _confirm(made: Plan, profile: Profile, *, yes: bool) -> None:
    """Ask before much is spent; where nobody can answer, --yes has to be given."""
    hours = made.totals()["gpu_hours"]
    if yes or hours <= profile.confirm_gpu_hours:
        return
    question = f"submit {hours:.4g} GPU-hours to {profile.name}"
    if not sys.stdin.isatty():
        raise InputError(
            f"{question}: more than its confirm_gpu_hours, {profile.confirm_gpu_hours:g}; say --yes"
        )
    typer.confirm(f"{question}?", abort=True)


def _hand_over(resolved: ResolvedStudy, made: Plan, profile: Profile | None) -> None:
    """Train here, or give what is missing to SLURM and say what was given."""
    if profile is None:
        _train(resolved, made)
        return
    done = submit_to_slurm(resolved, made, profile)
    name = resolved.study.name
    if done.arrays:
        console.print(
            f"{counted(done.runs, 'run')} in {counted(done.series, 'series')} submitted to {profile.name}: "
            f"SLURM jobs {', '.join(done.arrays)}"
        )
    else:
        console.print(f"nothing of {name} is left to submit")
    if done.taken:
        console.print(f"{counted(done.taken, 'series')} left to another submission")
    console.print(f"`ssmscale status {name} --watch` shows how they do", markup=False)


def _plan(resolved: ResolvedStudy, profile: Profile | None = None) -> Plan:
    cluster = this_machine() if profile is None else profile.cluster()
    try:
        return make_plan(
            resolved.study, resolved.points, resolved.corpus, resolved.root, cluster, jobs_of(resolved)
        )
    except InputError as error:
        raise InputError(f"{resolved.where}: {error}") from error


def _train(resolved: ResolvedStudy, made: Plan) -> None:
    """Train what is missing, say what a study is left with, and end with 1 where a Run failed."""
    try:
        rows = train_here(resolved, made)
    except DiskFull as full:
        errors.print(
            f"error: {full}; make some (`ssmscale prune {resolved.study.name}` drops checkpoints no run needs), then "
            f"the same command goes on from here",
            markup=False,
        )
        raise typer.Exit(1) from full
    tables.print_summary(console, resolved.study.name, rows)
    if any(row.state is RunState.FAILED for row in rows):
        raise typer.Exit(1)


@dataclass(frozen=True)
class _Fitted:
    """A fit and, where its points are a study's, what came with them."""

    checked: CheckedPoints
    document: FitDocument
    resolved: ResolvedStudy | None
    rows: list[RunStatus]
    tracker: Tracker | None


def _fit(
    study: str | None,
    points_file: Path | None,
    law: str,
    delta: float,
    reference: str | None,
    columns: Sequence[str] | None,
    root: Path | None,
) -> _Fitted:
    from analysis.document import fit_points
    from analysis.points import build_frame, check_points, read_table
    from harness.points_table import COLUMNS, cells, points_of

    if (study is None) == (points_file is None):
        raise InputError("give either a STUDY or --points FILE, and not both")
    names = {}
    for pair in columns or ():
        ours, equals, theirs = pair.partition("=")
        if not equals or not ours or not theirs:
            raise InputError(f"--column {pair}: is not OURS=THEIRS, such as n_params=params")
        names[ours] = theirs
    resolved, rows, tracker = None, list[RunStatus](), None
    if points_file is not None:
        frame = read_table(points_file, names)
    else:
        assert study is not None
        resolved = registered(study, root)
        rows = begun(resolved)
        tracker = bring_up_to_date(resolved, rows)
        points = list(points_of(rows, resolved.root))
        frame = build_frame(COLUMNS, cells(points), f"study {resolved.study.name}")
    checked = check_points(frame)
    document = fit_points(checked, law=law, delta=delta, reference=reference)
    return _Fitted(checked, document, resolved, rows, tracker)


def _command_line() -> str:
    import shlex

    return shlex.join(["ssmscale", *sys.argv[1:]])


def _commit() -> str | None:
    from harness.provenance import commit

    return commit()


if __name__ == "__main__":
    main()
