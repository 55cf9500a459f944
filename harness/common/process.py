"""Processes: their identity, their end and their output.

On Linux the id of the boot and the ticks from it to the start identify a process; elsewhere (macOS) the time of its
start does, which changes when the clock is set.
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
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import psutil

from harness.common.address import redact
from harness.common.disk import appending, make_folder
from harness.common.streams import flush_or_drop


def identify_process() -> dict[str, Any]:
    """Describe this process uniquely: on any host, and across reboots."""
    identity: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid()}
    facts = _kernel_facts(os.getpid())
    if facts is None:
        return {**identity, "process_started": psutil.Process().create_time()}
    return {**identity, "boot_id": _boot_id(), "started_ticks": facts[1]}


def process_is_alive(identity: Mapping[str, Any]) -> bool:
    """True if the process that `identify_process` described runs on this host."""
    if identity.get("host") != socket.gethostname():
        return False
    pid = identity.get("pid", 0)
    if "started_ticks" in identity:
        facts = _kernel_facts(pid)
        return (
            facts is not None
            and facts == (facts[0], identity["started_ticks"])
            and facts[0] not in {"Z", "X"}  # ended, but its parent has not waited for it yet
            and identity.get("boot_id") == _boot_id()
        )
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - identity["process_started"]) < 1.0
        return same and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, KeyError, ValueError, OverflowError):
        return False


def _kernel_facts(pid: int) -> tuple[str, int] | None:
    """Return the state and the start time in ticks of a process on Linux; None if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name in parentheses may hold any character
    return fields[0], int(fields[19])


def _boot_id() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None


def print_traceback() -> None:
    """Print the traceback of the exception being handled, unless its disk is full."""
    with contextlib.suppress(OSError):
        traceback.print_exc()
        sys.stderr.flush()


def last_line(path: Path) -> str:
    """Return the last line of a log that is not blank; "nothing" if there is none."""
    with contextlib.suppress(OSError):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "nothing")
    return "nothing"


def describe_end(path: Path) -> str:
    """Describe how a log ends."""
    return f"{path} ends: {last_line(path)}"


def end_at_once(status: int) -> NoReturn:
    """Run the exit handlers and end this process, without the 2 s it takes to free what torch and DeepSpeed hold."""
    atexit._run_exitfuncs()
    flush_or_drop()
    os._exit(status)


@contextlib.contextmanager
def sent_to(file: Path) -> Iterator[None]:
    """Append standard output and error to a file during the block; raises OSError or InputError if it does not open."""
    flush_or_drop()
    kept = os.dup(1), os.dup(2)
    try:
        with appending(file) as log:
            os.dup2(log, 1)
            os.dup2(log, 2)
        yield
    finally:
        flush_or_drop()
        for number, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, number)
            os.close(copy)


def start_logged(command: Sequence[str], log: Path, **more: Any) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own, with an empty input, and append its output to a log.

    `more` are parameters of Popen, which take precedence.
    """
    make_folder(log.parent)
    usual: dict[str, Any] = {"stdin": subprocess.DEVNULL, "start_new_session": True}
    with appending(log) as output:
        return subprocess.Popen(command, **(usual | {"stdout": output, "stderr": output} | more))


class PipeReader:
    """Reads whole lines from a pipe as they arrive."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._held = descriptor, b""
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLIN)
        self.is_ended = False
        """True if every writer has closed the pipe and all its lines have been read."""

    def read(self, seconds: float = 0.0) -> list[bytes]:
        """Return the lines that have arrived; if there are no data yet, wait for some for at most `seconds`."""
        while not self.is_ended and self._poll.poll(1000 * seconds):
            part = os.read(self._descriptor, 65536)
            self.is_ended, seconds = not part, 0.0
            self._held += part
        *lines, self._held = self._held.split(b"\n")
        return lines


class _Redacted(logging.Formatter):
    """Formats lines without passwords."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def log_to_stderr(level: int = logging.INFO) -> None:
    """Log to standard error without passwords, each line with its time."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Redacted("%(asctime)s %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])


@contextlib.contextmanager
def ignoring(*numbers: signal.Signals) -> Iterator[None]:
    """Ignore signals during the block; in another thread than the main one, which they do not reach, do nothing."""
    try:
        previous = [(number, signal.signal(number, signal.SIG_IGN)) for number in numbers]
    except ValueError:
        previous = []
    try:
        yield
    finally:
        for number, handler in previous:
            signal.signal(number, handler)


def stop_when_parent_ends(number: signal.Signals = signal.SIGTERM) -> None:
    """Ask the kernel to signal this process when its parent ends, unless it has ended already (Linux only)."""
    _prctl(1, int(number))  # PR_SET_PDEATHSIG


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends first (Linux only)."""
    _prctl(36, 1)  # PR_SET_CHILD_SUBREAPER


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)
