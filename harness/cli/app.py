"""The `ssmscale` command: a thin function a verb.

Exit status: 0 done, 1 some run failed, 2 the input is wrong. Errors are sentences on standard error; a traceback
only with --debug. With --json standard output holds one JSON document and nothing else.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from harness.cli.analysis import MISTAKES, fit, report, scale_up
from harness.cli.archive import export_study, import_bundle, points, prune, sync
from harness.cli.data import data_app
from harness.cli.evaluate import evaluate, generate
from harness.cli.plan import plan
from harness.cli.serve import serve
from harness.cli.status import cancel, doctor, logs, status
from harness.cli.submit import retry, submit
from harness.cli.tune import tune
from harness.common.console import Stopped, console, errors
from harness.common.disk import DiskFull
from harness.common.extras import missing_package
from harness.record.jobs import SchedulerUnavailable
from harness.record.provenance import installed_version
from ssmttm.errors import InputError

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
    """Entry point of `ssmscale`."""
    run(app, (InputError, *MISTAKES))


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


# The order of the help: the study is planned, submitted, watched and steered; then what came out of it.
VERBS: dict[str, Callable[..., None]] = {
    "plan": plan,
    "submit": submit,
    "status": status,
    "logs": logs,
    "cancel": cancel,
    "retry": retry,
    "sync": sync,
    "prune": prune,
    "tune": tune,
    "export": export_study,
    "import": import_bundle,
    "generate": generate,
    "evaluate": evaluate,
    "points": points,
    "fit": fit,
    "report": report,
    "scale-up": scale_up,
    "serve": serve,
    "doctor": doctor,
}
for name, verb in VERBS.items():
    app.command(name)(verb)


def run(command: Callable[[], object], mistakes: tuple[type[Exception], ...]) -> None:
    """Call a command line; `mistakes` are what it raises for input that is wrong."""
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    try:
        command()
    except mistakes as error:
        _fail(error, debug=debug, status=2)
    except ModuleNotFoundError as error:
        _fail(missing_package(error), debug=debug, status=2, cause=error)
    except SchedulerUnavailable as silence:
        _fail(f"{silence.scheduler}: {silence}", debug=debug, status=1, cause=silence)
    except DiskFull as full:
        _fail(
            f"{full}; {full.remedy}, then the same command goes on from here",
            debug=debug,
            status=1,
            cause=full,
        )
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
        errors.print(f"error: {line}")
    sys.exit(status)


if __name__ == "__main__":
    main()
