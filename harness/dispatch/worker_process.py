"""One rank as a process that stays: `python -m harness.train.worker --feed`, given one Series after the other.

It is told what to train on its standard input and answers on its standard output; everything else it says goes to a
log. It saves and ends when it is told to, when its input ends, and when the process that started it is gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from harness.common.process import PipeReader
from harness.dispatch.fork_server import PLAIN, ForkedRank
from harness.record.jobs import JobState

GRACE_SECONDS = 60.0
"""How long a worker may take over its last step and its checkpoint when it is asked to stop."""
ALONE_SECONDS = 10.0
"""How long one may take whose other ranks are gone, for whom it waits in vain."""


def environment_of_rank(rank: int, ranks: int, threads: int, **more: str) -> dict[str, str]:
    """What a rank of a group of `ranks` needs to be told, beside how it finds the others."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "SUBMITIT_EXECUTOR": "",  # a job that all this runs in has a rank of its own, which is not this one's
        **more,
    }


_Process = subprocess.Popen[bytes] | ForkedRank


class RankProcess:
    """A worker process that is fed; it dies with the thread that made it."""

    def __init__(self, environment: Mapping[str, str], log: Path, server: str | None = None) -> None:
        """Start it, forked by the rank server of that address where there is one."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as said:
            self._process = _start({**os.environ, **environment}, said, server)
        assert self._process.stdout is not None
        self._answers = PipeReader(self._process.stdout.fileno())
        self.is_ready = False
        """Whether it has imported what it needs and found the other ranks."""
        self.replies: list[str] = []
        """Outcomes of Series it was fed, oldest first, not yet taken up."""

    @property
    def status(self) -> int | None:
        """Its exit status; None while it is there."""
        return self._process.poll()

    def feed(self, run_dirs: Sequence[Path]) -> None:
        """Have it train a Series."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died; its status says so
            self._process.stdin.write(json.dumps([str(path) for path in run_dirs]).encode() + b"\n")
            self._process.stdin.flush()

    def listen(self, seconds: float = 0.0) -> None:
        """Take up what it has answered; where it has not, wait for that so many seconds at most."""
        for line in self._answers.read(seconds):
            reply = json.loads(line)
            self.is_ready = self.is_ready or "ready" in reply
            if "outcome" in reply:
                self.replies.append(reply["outcome"])

    def wait_for_word(self, seconds: float) -> None:
        """Take up what it has answered, waiting for it so many seconds at most; its end is a word too."""
        if self._answers.is_ended and not self.replies:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=seconds)
        elif not self.replies:
            self.listen(seconds)

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, if it is there."""
        if self._process.poll() is None:
            self._process.send_signal(number)

    def ask_to_stop(self) -> None:
        """Ask for its end: at once where it is idle, after saving where it trains."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self.signal(signal.SIGTERM)

    def end(self, seconds: float) -> None:
        """Wait for its end, and kill it where it takes longer than so many seconds."""
        try:
            self._process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _start(environment: Mapping[str, str], log: IO[bytes], server: str | None) -> _Process:
    if server is not None:
        with contextlib.suppress(OSError):  # it is gone: a plain process takes longer, and does as well
            return ForkedRank(server, environment, log)
    return subprocess.Popen(
        PLAIN,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env=environment,
        start_new_session=True,
    )


def state_of(outcome: str) -> JobState:
    """What a worker's answer means for its job."""
    known = {"busy": JobState.BUSY, "preempted": JobState.PREEMPTED, "no_space": JobState.NO_SPACE}
    return known.get(outcome, JobState.ENDED)
