"""Waiting for what other processes do: for conditions and never for times, so that no test fails on a slow machine."""

from __future__ import annotations

import resource
import signal
import subprocess
import time
from collections.abc import Callable

PATIENCE = 600.0
"""Seconds after which a test gives up: of no use but to end one that would wait for ever."""


def wait_until(
    holds: Callable[[], object],
    seconds: float = PATIENCE,
    *,
    on: subprocess.Popen[str] | None = None,
    at_once: bool = False,
) -> None:
    """Return when that holds; what the process waited `on` was doing is told where it never does.

    Looks take a tenth of a core, so that asking SLURM or going through all processes does not slow down what is
    waited for; `at_once` looks every moment, for what is over soon.
    """
    deadline = time.monotonic() + seconds
    while True:
        before = _cpu_seconds()
        if holds():
            return
        assert time.monotonic() < deadline, f"waited in vain\n{state_of(on) if on else ''}"
        time.sleep(0.02 if at_once else max(0.02, min(9 * (_cpu_seconds() - before), 0.5)))


def _cpu_seconds() -> float:
    """What this process and those it has waited for have computed."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def state_of(process: subprocess.Popen[str]) -> str:
    """What a process has said, and where each of its threads is if it runs with `-X faulthandler`; ends it."""
    if process.poll() is None:
        process.send_signal(signal.SIGABRT)
    said, errors = process.communicate()
    return f"status {process.returncode}\n{said}\n{errors or ''}"
