"""Waiting for what other processes do: for conditions and never for times, so that no test fails on a slow machine.

What is over soon is made to last instead: steps of training come at a given pace (`paced`), however fast the machine.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil

PATIENCE = 600.0
"""Seconds after which a test gives up: of no use but to end one that would wait for ever."""

PACED = Path(__file__).parent / "paced"
"""A folder for PYTHONPATH: with it, and PACED_STEP_SECONDS, optimiser steps come at a given pace."""


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


def paced(seconds: float) -> dict[str, str]:
    """An environment in which steps of training take so long at least: whoever looks for one in time finds it."""
    before = [path for path in [os.environ.get("PYTHONPATH")] if path]
    path = os.pathsep.join([str(PACED), *before])
    return {**os.environ, "PYTHONPATH": path, "PACED_STEP_SECONDS": str(seconds)}


def is_running(process: psutil.Process) -> bool:
    """Whether a process has not ended; it may end while it is asked after."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def state_of(process: subprocess.Popen[str]) -> str:
    """What a process has said, and where each of its threads is if it runs with `-X faulthandler`; ends it."""
    if process.poll() is None:
        process.send_signal(signal.SIGABRT)
    said, errors = process.communicate()
    return f"status {process.returncode}\n{said}\n{errors or ''}"
