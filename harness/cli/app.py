"""The `ssmscale` command: its verbs, each imported when it is called, and its exit status.

Exit status: 0 done, 1 a run failed, 2 the input is wrong. Errors are sentences on standard error; --debug adds the
traceback. With --json standard output holds one JSON document and nothing else.
"""

from __future__ import annotations

import gc
import os
import sys
from importlib import import_module
from io import TextIOWrapper
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperGroup

from harness.common.console import Stopped, console, errors
from harness.common.streams import flush_or_drop


class Verb(NamedTuple):
    """A verb that is imported when it is called."""

    place: str
    """Module and function."""
    help: str
    """First paragraph of its help, repeated here so that `ssmscale --help` imports no verb."""
    examples: tuple[str, ...] = ()
    """Arguments to call it with."""


VERBS = {
    # The order of the help: the study is planned, submitted, watched and steered; then its results.
    "plan": Verb(
        "harness.cli.plan:plan",
        "Show what is left to train and what it costs; train nothing.",
        (
            "sweeps/demo.yaml",
            "demo --runs",
            "demo --set training.batch=16",
            "demo --design",
            "demo --budget 0.5",
        ),
    ),
    "submit": Verb(
        "harness.cli.submit:submit",
        "Train every run of a study that has not finished.",
        (
            "sweeps/demo.yaml --on local",
            "study.yaml --on slurm --cluster h100x8 --root /shared/runs --dry-run",
        ),
    ),
    "status": Verb(
        "harness.cli.status:status",
        "Show the state of a study's runs.",
        ("demo", "demo --watch", "demo --runs", "demo --json"),
    ),
    "logs": Verb(
        "harness.cli.status:logs",
        "Print the logs of a run and of its jobs.",
        ("demo 9a19", "demo 9a19 --follow"),
    ),
    "cancel": Verb(
        "harness.cli.status:cancel",
        "Cancel runs that are not over; other runs of their series go on.",
        ("demo", "demo 9a19 bb5b"),
    ),
    "retry": Verb(
        "harness.cli.submit:retry",
        "Reset failed and cancelled runs, then submit what is missing.",
        ("demo", "demo 9a19", "sweeps/demo.yaml", "demo --on local"),
    ),
    "sync": Verb("harness.cli.archive:sync", "Correct MLflow by the journals.", ("demo",)),
    "prune": Verb(
        "harness.cli.archive:prune",
        "Remove checkpoints that no run, trial or extension needs.",
        ("demo --dry-run", "demo"),
    ),
    "tune": Verb(
        "harness.cli.tune:tune",
        "Tune small sizes and carry the learning rate to the large ones.",
        ("sweeps/tune_lr.yaml --on local", "sweeps/tune_lr.yaml --on slurm --cluster h100x8 --yes"),
    ),
    "export": Verb(
        "harness.cli.archive:export_study",
        "Write the finished runs of a study into one file, no weights.",
        ("demo --out demo.zip",),
    ),
    "import": Verb(
        "harness.cli.archive:import_bundle",
        "Add the finished runs of an exported file to those here.",
        ("demo.zip --root elsewhere",),
    ),
    "generate": Verb(
        "harness.cli.generate:generate",
        "Generate music for captions with a finished run.",
        (
            '9a19 --prompt "A calm chorale in G minor" --out calm.wav',
            "9a19 --prompts captions.txt --out pieces/",
        ),
    ),
    "evaluate": Verb(
        "harness.cli.evaluate:evaluate",
        "Measure finished runs: held-out loss, quality of their music.",
        (
            "demo --limit 64 --out metrics.csv",
            "demo 9a19 --clap laion/larger_clap_music",
            "demo --on slurm --cluster h100x8",
        ),
    ),
    "points": Verb(
        "harness.cli.archive:points",
        "Write a table of finished runs as CSV, a row a run.",
        ("demo", "demo --out points.csv", "demo --all --out points.parquet"),
    ),
    "fit": Verb(
        "harness.cli.analysis:fit",
        "Fit a scaling law to each architecture and compare them.",
        (
            "demo",
            "demo --law chinchilla_shared_e --predict 300M:4000",
            "--points any.csv --column n_params=params --json",
        ),
    ),
    "report": Verb(
        "harness.cli.analysis:report",
        "Write an HTML report: curves, comparison and warnings.",
        ("demo --out report",),
    ),
    "scale-up": Verb(
        "harness.cli.analysis:scale_up",
        "Propose the next runs for a budget and predict their loss.",
        ("demo --budget 5", "demo"),
    ),
    "serve": Verb(
        "harness.cli.serve:serve",
        "Run MLflow's tracking server, behind a login, until Ctrl-C.",
        ("demo", "demo --host 0.0.0.0 --database postgresql://mlflow@db.example.org/mlflow"),
    ),
    "doctor": Verb(
        "harness.cli.doctor:doctor",
        "Check this machine, and a cluster if one is named.",
        ("", "--cluster h100x8"),
    ),
    "data": Verb("harness.cli.data:data_app", "Build and inspect corpora of music tokens."),
}

FIRST_STEPS = """\
ssmscale trains scaling studies of state-space models against the Transformer.

  ssmscale doctor                                  check this machine
  ssmscale data build --out corpora/bach --limit 220 --segment-seconds 5.12 \\
      --codebooks 2 --codebook-size 256            make a small corpus
  ssmscale plan sweeps/demo.yaml                   see what a study costs
  ssmscale submit sweeps/demo.yaml --on local      train it
  ssmscale status demo --watch                     follow it
  ssmscale report demo --out report                write the report

`ssmscale --help` lists the verbs, `ssmscale VERB --help` shows examples.
`ssmscale --install-completion` completes verbs, studies and run ids by TAB."""


def main() -> None:
    """Run `ssmscale` with the arguments of this process."""
    _leave_folder_out()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a character that the terminal lacks is printed escaped
            stream.reconfigure(errors="backslashreplace")
    gc.set_threshold(100_000)  # reading ten thousand journals makes many objects and no garbage
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except Stopped:
        errors.print("stopped; the same command goes on from here")
        sys.exit(130)
    except BrokenPipeError:
        flush_or_drop()
        sys.exit(1)
    except Exception as error:
        if debug:
            raise
        problem, status = explain(error)
        for line in problem.splitlines() or [type(error).__name__]:
            errors.print(f"error: {line}")
        flush_or_drop()
        sys.exit(status)


def _leave_folder_out() -> None:
    """Have no interpreter below this process import from the folder where the command was called.

    An empty part of PYTHONPATH, as `PYTHONPATH=$PYTHONPATH:more` often makes, stands for that folder.
    """
    os.environ["PYTHONSAFEPATH"] = "1"
    parts = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    kept = [part for part in parts if part]
    if kept != parts:
        os.environ["PYTHONPATH"] = os.pathsep.join(kept)


class _LazyGroup(TyperGroup):
    """A group whose verbs are imported when they are called; until then the help shows VERBS."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        return name, load_verb(name) if name else command, rest


app = typer.Typer(
    name="ssmscale",
    cls=_LazyGroup,
    help="Scaling studies of state-space models against the Transformer: plan, train, track, fit, report.",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["--help", "-h"]},
)


def load_verb(name: str) -> Any:
    """Import a verb and return its command."""
    from harness.cli.names import suggest_names
    from harness.cli.options import expand_options

    module, _, attribute = VERBS[name].place.partition(":")
    verb = getattr(import_module(module), attribute)
    if not isinstance(verb, typer.Typer):
        alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
        examples = [f"ssmscale {name} {example}".strip() for example in VERBS[name].examples]
        alone.command(name, epilog="\n\n".join(["Examples:", *examples]))(suggest_names(expand_options(verb)))
        verb = alone
    return typer.main.get_command(verb)


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    from harness.record.provenance import commit, installed_version

    code = commit()
    changed = ", with changes" if code and code.endswith("+") else ""
    of_commit = f" (commit {code[:12]}{changed})" if code else ""
    console.print(f"ssmscale {installed_version('ssmscale')}{of_commit}")
    console.print(f"Python {sys.version.split()[0]}, {_torch_build()}")
    raise typer.Exit


def _torch_build() -> str:
    """Return torch's version and the CUDA version that it was built for, without importing it."""
    from importlib.util import find_spec
    from pathlib import Path
    from runpy import run_path

    found = find_spec("torch")
    if found is None or found.origin is None:
        return "torch is not installed"
    build = run_path(str(Path(found.origin).with_name("version.py")))
    return (
        f"torch {build['__version__']}, {'CUDA ' + build['cuda'] if build['cuda'] else 'built without CUDA'}"
    )


@app.callback()
def _globals(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,  # noqa: ARG001
    version: Annotated[  # noqa: ARG001
        bool,
        typer.Option(
            "--version",
            help="Show the versions of ssmscale and torch.",
            callback=_print_version,
            is_eager=True,
        ),
    ] = False,
) -> None:
    """Declare for --help the options that main() and _print_version() read."""
    if context.invoked_subcommand is None:
        console.print(FIRST_STEPS)


def _not_loaded() -> None:
    """Stand for a verb that is not imported yet."""


for verb, found in VERBS.items():
    app.command(verb, help=found.help)(_not_loaded)


def explain(error: Exception) -> tuple[str, int]:
    """Return the message for the user about an error, and the exit status of the command."""
    from harness.cli.analysis import MISTAKES
    from harness.common.disk import DiskFull
    from harness.common.extras import missing_package
    from harness.record.jobs import SchedulerUnavailable
    from ssmttm.errors import InputError

    if isinstance(error, (InputError, *MISTAKES)):
        return str(error), 2
    if isinstance(error, ModuleNotFoundError):
        return missing_package(error), 2
    if isinstance(error, SchedulerUnavailable):
        return f"{error.scheduler}: {error}", 1
    if isinstance(error, DiskFull):
        return f"{error}; {error.remedy}, then the same command goes on from here", 1
    if isinstance(error, FileNotFoundError | NotADirectoryError | PermissionError):
        named = error.filename is not None and error.strerror is not None
        return f"{error.filename}: {error.strerror}" if named else str(error) or type(error).__name__, 2
    if isinstance(error, OSError):
        return str(error), 1
    return f"unexpected {type(error).__name__}: {error} (--debug shows where)", 1
