"""Waiting for what other processes do: for conditions and never for times, so that no test fails on a slow machine."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable

PATIENCE = 600.0
"""Seconds after which a test gives up: of no use but to end one that would wait for ever."""


def wait_until(
    holds: Callable[[], object], seconds: float = PATIENCE, *, on: subprocess.Popen[str] | None = None
) -> None:
    """Return when that holds; what the process waited `on` was doing is told where it never does."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"waited in vain\n{state_of(on) if on else ''}"
        time.sleep(0.02)


def state_of(process: subprocess.Popen[str]) -> str:
    """What a process has said, and where each of its threads is if it runs with `-X faulthandler`; ends it."""
    if process.poll() is None:
        process.send_signal(signal.SIGABRT)
    said, errors = process.communicate()
    return f"status {process.returncode}\n{said}\n{errors or ''}"
