"""The `ssmscale` command: its verbs, each imported when it is called, and how it ends.

Exit status: 0 done, 1 some run failed, 2 the input is wrong. Errors are sentences on standard error; a traceback
only with --debug. With --json standard output holds one JSON document and nothing else.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from harness.common.console import Stopped, console, errors

VERBS = {
    # The order of the help: the study is planned, submitted, watched and steered; then what came out of it.
    "plan": ("harness.cli.plan:plan", "What is left to train and what it will cost; trains nothing."),
    "submit": (
        "harness.cli.submit:submit",
        "Train what is missing of a study; what is finished is reused, what is interrupted goes on.",
    ),
    "status": ("harness.cli.status:status", "Where every run of a study stands."),
    "logs": ("harness.cli.status:logs", "What a run's workers printed, and SLURM about its jobs."),
    "cancel": (
        "harness.cli.status:cancel",
        "Cancel runs of a study that are not over; others of the same trunk go on.",
    ),
    "retry": (
        "harness.cli.submit:retry",
        "Forget failures and cancellations, then submit what is missing.",
    ),
    "sync": (
        "harness.cli.archive:sync",
        "Check MLflow against the journals: send what it lacks, merge what is there twice, settle what nobody trains.",
    ),
    "prune": (
        "harness.cli.archive:prune",
        "Drop checkpoints no run, trial or extension needs; final weights stay, and so does what retry goes on from.",
    ),
    "tune": (
        "harness.cli.tune:tune",
        "Search the study's `tune:` keys for its smaller sizes, and carry the learning rate to the others (Optuna).",
    ),
    "export": (
        "harness.cli.archive:export_study",
        "Write the finished runs of a study into one file: identities, journals and points; no weights.",
    ),
    "import": (
        "harness.cli.archive:import_bundle",
        "Add a bundle's finished runs to those here; it is checked whole first, and twice is as good as once.",
    ),
    "generate": (
        "harness.cli.evaluate:generate",
        "Write music for captions, by a finished run, as sound files with a JSON file beside each.",
    ),
    "evaluate": (
        "harness.cli.evaluate:evaluate",
        "Measure finished runs: held-out loss, and how near what they generate comes to music and to its captions.",
    ),
    "points": (
        "harness.cli.archive:points",
        "The table of finished runs, a row a run, as CSV: from the journals, which MLflow is brought up to first.",
    ),
    "fit": (
        "harness.cli.analysis:fit",
        "Fit a scaling law to each architecture and compare them at equal loss.",
    ),
    "report": (
        "harness.cli.analysis:report",
        "Write the report: one self-contained HTML page with the curves, the comparison and every warning.",
    ),
    "scale-up": (
        "harness.cli.analysis:scale_up",
        "What to train next for a budget, with the loss foreseen for it; "
        "later, what was foreseen beside what was seen.",
    ),
    "serve": (
        "harness.cli.serve:serve",
        "MLflow's server and page on a database, until Ctrl-C; prints what jobs need to find it.",
    ),
    "doctor": (
        "harness.cli.doctor:doctor",
        "What of this machine, and of a cluster that is named, works, and what to do about the rest.",
    ),
    "data": ("harness.cli.data:data_app", "Build corpora of music tokens, and look into them."),
}
"""Where each verb is, and the first line of its help, so that `ssmscale --help` imports none of them."""


def main() -> None:
    """Run `ssmscale` with the arguments of this process."""
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    try:
        app()
    except Stopped:
        errors.print("stopped; the same command goes on from here")
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if debug:
            raise
        problem, status = explain(error)
        for line in problem.splitlines() or [type(error).__name__]:
            errors.print(f"error: {line}")
        sys.exit(status)


class _LazyGroup(TyperGroup):
    """A group whose verbs are imported when they are called; until then the help shows what VERBS says of them."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, _, rest = super().resolve_command(ctx, args)
        assert name is not None
        return name, load_verb(name), rest


app = typer.Typer(
    name="ssmscale",
    cls=_LazyGroup,
    help="Scaling studies of state-space models against the Transformer: plan, train, track, fit, report.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
)


def load_verb(name: str) -> Any:
    """Import a verb and return its command."""
    from harness.cli.options import expand_options

    module, _, attribute = VERBS[name][0].partition(":")
    verb = getattr(import_module(module), attribute)
    if not isinstance(verb, typer.Typer):
        alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
        alone.command(name)(expand_options(verb))
        verb = alone
    return typer.main.get_command(verb)


def _print_version(wanted: bool) -> None:
    if wanted:
        from harness.record.provenance import installed_version

        console.print(f"ssmscale {installed_version('ssmscale')}")
        raise typer.Exit


@app.callback()
def _globals(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Declare for --help the options that main() and _print_version() read."""


def _not_loaded() -> None:
    """Stand for a verb that is not imported yet."""


for verb, (_, first_line) in VERBS.items():
    app.command(verb, help=first_line)(_not_loaded)


def explain(error: Exception) -> tuple[str, int]:
    """Return what a user should read about an error, and the exit status of the command."""
    from harness.common.disk import DiskFull
    from harness.common.extras import missing_package
    from harness.record.jobs import SchedulerUnavailable
    from ssmttm.errors import InputError

    if isinstance(error, InputError) or _is_of_the_analysis(error):
        return str(error), 2
    if isinstance(error, ModuleNotFoundError):
        return missing_package(error), 2
    if isinstance(error, SchedulerUnavailable):
        return f"{error.scheduler}: {error}", 1
    if isinstance(error, DiskFull):
        return f"{error}; {error.remedy}, then the same command goes on from here", 1
    if isinstance(error, FileNotFoundError | NotADirectoryError | PermissionError):
        return f"{error.filename}: {error.strerror}", 2
    if isinstance(error, OSError):
        return str(error), 1
    return f"unexpected {type(error).__name__}: {error} (--debug shows where)", 1


def _is_of_the_analysis(error: Exception) -> bool:
    from harness.cli.analysis import MISTAKES

    return isinstance(error, MISTAKES)


if __name__ == "__main__":
    main()
