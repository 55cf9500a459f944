"""Wait for conditions in other processes, never for a time, so that no test fails on a slow machine.

Training that would be over too soon is made to last: its steps come at a given pace (`paced`).
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
"""Seconds after which a test gives up, so that none waits for ever."""

PACED = Path(__file__).parent / "paced"
"""A folder for PYTHONPATH: with it, optimiser steps come every PACED_STEP_SECONDS."""


def wait_until(
    holds: Callable[[], object],
    seconds: float = PATIENCE,
    *,
    on: subprocess.Popen[str] | None = None,
    at_once: bool = False,
) -> None:
    """Return when a condition holds; if it never does, fail with the output of the process `on`.

    Looking takes at most a tenth of a core, so that it does not slow down what is waited for; `at_once` looks every
    20 ms, for a condition that soon passes.
    """
    deadline = time.monotonic() + seconds
    while True:
        before = _cpu_seconds()
        if holds():
            return
        assert time.monotonic() < deadline, f"waited in vain\n{state_of(on) if on else ''}"
        time.sleep(0.02 if at_once else max(0.02, min(9 * (_cpu_seconds() - before), 0.5)))


def _cpu_seconds() -> float:
    """CPU time of this process and of the children it has waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def paced(seconds: float) -> dict[str, str]:
    """Return an environment in which a step of training takes so many seconds at least."""
    before = [path for path in [os.environ.get("PYTHONPATH")] if path]
    path = os.pathsep.join([str(PACED), *before])
    return {**os.environ, "PYTHONPATH": path, "PACED_STEP_SECONDS": str(seconds)}


def is_running(process: psutil.Process) -> bool:
    """True if a process has not ended."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def state_of(process: subprocess.Popen[str]) -> str:
    """End a process; returns its output, with the stack of each thread if it runs with `-X faulthandler`."""
    if process.poll() is None:
        process.send_signal(signal.SIGABRT)
    said, errors = process.communicate()
    return f"status {process.returncode}\n{said}\n{errors or ''}"
