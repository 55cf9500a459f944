"""One rank as a warm process, `python -m harness.train.worker --feed`, which trains one Series after another.

It reads the orders of tasks from standard input and replies on standard output; all other output goes to a log. It
saves and ends on SIGTERM, when its input ends, and when its parent process ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Collection, Mapping
from pathlib import Path

from pydantic import JsonValue

from harness.common.disk import make_folder
from harness.common.limits import oom_kills
from harness.common.process import PipeReader, start_logged
from harness.dispatch.fork_server import PLAIN, ForkedRank
from harness.record.jobs import JobState
from harness.train.stopping import (
    EXIT_BAD_NODE,
    EXIT_NO_SPACE,
    EXIT_OUT_OF_MEMORY,
    EXIT_PREEMPTED,
    STACK_SIGNAL,
)

GRACE_SECONDS = 60.0
"""Time a worker has for its last step and its checkpoint after it is asked to stop."""
ALONE_SECONDS = 10.0
"""Time a worker has to stop after another rank of its group has died: it may wait for that rank for ever."""
KILL_SECONDS = 30.0
"""Time for a killed process to end; one that waits for a hanging file system ends when that answers."""


def environment_of_rank(rank: int, ranks: int, threads: int, **more: str) -> dict[str, str]:
    """Return the environment of one of `ranks` ranks; `more` says how it finds the others."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "SUBMITIT_EXECUTOR": "",  # else the rank is taken from the job that all of this runs in
        **more,
    }


_Process = subprocess.Popen[bytes] | ForkedRank


class RankProcess:
    """A warm worker process; it ends with the thread that started it."""

    def __init__(self, environment: Mapping[str, str], log: Path, server: str | None = None) -> None:
        """Start it, forked by the rank server at the address `server` if there is one."""
        make_folder(log.parent)
        self._process = _start({**os.environ, **environment}, log, server)
        assert self._process.stdout is not None
        self._pipe = PipeReader(self._process.stdout.fileno())
        self.is_ready = False
        """True once it has made its imports and found the other ranks."""
        self._oom_kills = oom_kills()
        self.replies: list[str] = []
        """Outcomes of the Series it was fed, oldest first, until the caller removes them."""
        self.is_spent = False
        """True if it has lost memory to the last Series, and another process should train the next one."""

    @property
    def status(self) -> int | None:
        """Its exit status, 71 if the system killed it for memory; None while it runs."""
        status = self._process.poll()
        if status == -signal.SIGKILL and oom_kills() > self._oom_kills:
            return EXIT_OUT_OF_MEMORY
        return status

    def feed(self, order: JsonValue) -> None:
        """Have it do the work of a task's order."""
        assert self._process.stdin is not None
        self._oom_kills = oom_kills()
        with contextlib.suppress(BrokenPipeError):  # it has died; `status` tells
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()

    def listen(self, seconds: float = 0.0) -> None:
        """Read its replies, waiting up to `seconds` for the first."""
        for line in self._pipe.read(seconds):
            reply = json.loads(line)
            self.is_ready = self.is_ready or "ready" in reply
            if "outcome" in reply:
                self.replies.append(reply["outcome"])
                self.is_spent = reply.get("is_spent", False)

    def wait_for_reply(self, seconds: float) -> None:
        """Wait up to `seconds` for an outcome that is not yet taken, or for the end of the process."""
        if self._pipe.is_ended and not self.replies:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=seconds)
        elif not self.replies:
            self.listen(seconds)

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal if it runs."""
        if self._process.poll() is None:
            self._process.send_signal(number)

    def show_stack(self) -> None:
        """Have it write the stack of each thread into its log, also if it was stopped."""
        self.signal(STACK_SIGNAL)
        self.signal(signal.SIGCONT)

    def ask_to_stop(self) -> None:
        """Ask it to end: at once if it is idle, after saving if it trains."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self.signal(signal.SIGTERM)

    def end(self, seconds: float) -> None:
        """Wait up to `seconds` for its end, then kill it."""
        try:
            self._process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=KILL_SECONDS)


def _start(environment: Mapping[str, str], log: Path, server: str | None) -> _Process:
    if server is not None:
        with contextlib.suppress(OSError):  # it has ended: a plain process starts more slowly, and serves
            return ForkedRank(server, environment, log)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return start_logged(PLAIN, log, env=environment, **pipes)


def state_of(outcome: str) -> JobState:
    """Return the state of the job whose worker replied with this outcome."""
    known = {"busy": JobState.BUSY, "preempted": JobState.PREEMPTED, "no_space": JobState.NO_SPACE}
    return known.get(outcome, JobState.ENDED)


def state_at_end(statuses: Collection[int | None]) -> JobState:
    """Return the state of a job whose ranks ended with these exit statuses before they replied."""
    if EXIT_NO_SPACE in statuses:
        return JobState.NO_SPACE
    if EXIT_OUT_OF_MEMORY in statuses:
        return JobState.OUT_OF_MEMORY
    is_lost = EXIT_BAD_NODE in statuses or EXIT_PREEMPTED not in statuses
    return JobState.LOST if is_lost else JobState.PREEMPTED
