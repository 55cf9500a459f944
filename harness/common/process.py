"""Processes: their identity, their end, and what they print.

A process's time of birth, as clocks tell it, moves when the clock is set. The kernel counts in ticks since it started,
and names that start; where there is no such kernel (macOS) the time of birth has to do. What a worker prints goes to
files, and their disk may be full: then the output is lost, and nothing else is.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import logging
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import psutil

BOOT = Path("/proc/sys/kernel/random/boot_id")


def identify_process() -> dict[str, Any]:
    """Describe this process so that no other is taken for it, on this host and others, before and after a restart."""
    identity: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid()}
    facts = _kernel_facts(os.getpid())
    if facts is None:
        return {**identity, "process_started": psutil.Process().create_time()}
    return {**identity, "boot_id": _boot_id(), "started_ticks": facts[1]}


def process_is_alive(identity: Mapping[str, Any]) -> bool:
    """True if the process that `identify_process` described still runs; never known of another host's processes."""
    if identity.get("host") != socket.gethostname():
        return False
    pid = identity.get("pid", 0)
    if "started_ticks" in identity:
        facts = _kernel_facts(pid)
        return (
            facts is not None
            and facts == (facts[0], identity["started_ticks"])
            and facts[0] not in {"Z", "X"}  # ended, and not yet waited for
            and identity.get("boot_id") == _boot_id()
        )
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - identity["process_started"]) < 1.0
        return same and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, KeyError, ValueError, OverflowError):
        return False


def _kernel_facts(pid: int) -> tuple[str, int] | None:
    """State and time of birth in ticks of a process of this machine's Linux kernel; None without one."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may hold anything
    return fields[0], int(fields[19])


def _boot_id() -> str | None:
    try:
        return BOOT.read_text(encoding="ascii").strip()
    except OSError:
        return None


def print_traceback() -> None:
    """Print the traceback of the exception being handled, where that can be printed."""
    with contextlib.suppress(OSError):
        traceback.print_exc()
        sys.stderr.flush()


def flush_or_drop() -> None:
    """Empty the buffers of standard output and error; what has no room is dropped, and so is what follows it.

    Python ends with status 120 where it finds a buffer it cannot empty.
    """
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)
            stream.flush()


def last_line(path: Path) -> str:
    """Return the last line of a log that is not blank; "nothing" where there is none."""
    with contextlib.suppress(OSError):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "nothing")
    return "nothing"


def end_at_once(status: int) -> NoReturn:
    """End this process when its exit handlers have run, without taking apart what it imported.

    Python would free every object of torch's and DeepSpeed's first, which takes 2 s of a core.
    """
    atexit._run_exitfuncs()
    flush_or_drop()
    os._exit(status)


@contextlib.contextmanager
def sent_to(file: Path) -> Iterator[None]:
    """Append standard output and error to a file during the block. Raises OSError where it cannot be opened."""
    flush_or_drop()
    kept = os.dup(1), os.dup(2)
    try:
        with file.open("ab") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        yield
    finally:
        flush_or_drop()
        for number, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, number)
            os.close(copy)


class PipeReader:
    """Whole lines of a pipe, as they come."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._held = descriptor, b""
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLIN)
        self.is_ended = False
        """Whether nobody writes into it any more, and all that was written has been read."""

    def read(self, seconds: float = 0.0) -> list[bytes]:
        """Return the lines that have come; where nothing has, wait for it so many seconds at most."""
        while not self.is_ended and self._poll.poll(1000 * seconds):
            part = os.read(self._descriptor, 65536)
            self.is_ended, seconds = not part, 0.0
            self._held += part
        *lines, self._held = self._held.split(b"\n")
        return lines


def log_to_stderr() -> None:
    """Write this program's log to standard error, each line with its time."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)


def stop_when_parent_ends(number: signal.Signals = signal.SIGTERM) -> None:
    """Ask the kernel for a signal when the process that started this one ends (Linux; elsewhere nothing).

    A parent that has ended already is not noticed: a caller that must know compares parents.
    """
    _prctl(1, int(number))  # PR_SET_PDEATHSIG


def adopt_orphans() -> None:
    """Have the kernel hand this process the children of its children that end first (Linux; elsewhere nothing)."""
    _prctl(36, 1)  # PR_SET_CHILD_SUBREAPER


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)
