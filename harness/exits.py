"""How the command ends: what went wrong as sentences on standard error, and a status that says whose fault it is."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from harness.disk import DiskFull
from harness.dispatch.ray_jobs import RayGone
from harness.dispatch.slurm_queue import SchedulerGone
from harness.extras import missing_package
from harness.foreground import Stopped
from harness.ray_place import RayDown
from harness.terminal import errors


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
    except RayGone as gone:
        _fail(f"Ray: {gone}", debug=debug, status=1, cause=gone)
    except SchedulerGone as gone:
        _fail(f"SLURM: {gone}", debug=debug, status=1, cause=gone)
    except RayDown as down:
        _fail(f"Ray: {down}", debug=debug, status=1, cause=down)
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
        errors.print(f"error: {line}", markup=False)
    sys.exit(status)
