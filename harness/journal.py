"""The run's own record: append-only JSON lines, one file an attempt, from which all state is derived.

An attempt opens journal/NNNN.jsonl with O_EXCL, so two processes never share one. A newer attempt fences older
ones: a process that finds a younger file beside its own stops writing, because it was thought dead and has been
replaced. A line torn by a crash is passed over. A step seen by two attempts counts once, the later one's word.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

import psutil
from filelock import FileLock

FORMAT = "{:04d}.jsonl"


class Event(StrEnum):
    """What a line of a journal tells."""

    STARTED = "started"
    RESUMED = "resumed"
    STEP = "step"
    EVAL = "eval"
    CHECKPOINT = "checkpoint"
    PREEMPTED = "preempted"
    CANCELLED = "cancelled"
    FINISHED = "finished"
    FAILED = "failed"
    WARNING = "warning"


DURABLE = frozenset(Event) - {Event.STEP, Event.EVAL, Event.WARNING}
"""Events that must be on disk before training goes on."""


class Fenced(RuntimeError):
    """A newer attempt has taken over; whoever is told so writes nothing more and leaves."""


class Journal:
    """The journal of one attempt, open for appending."""

    def __init__(self, path: Path, attempt: int) -> None:
        self.path = path
        self.attempt = attempt
        self._next = path.with_name(FORMAT.format(attempt + 1))
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_WRONLY, 0o644)
        self._file = os.fdopen(descriptor, "w", encoding="utf-8")

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Begin a new attempt on the run or series of `directory`."""
        folder = directory / "journal"
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            attempt = max(attempts(directory), default=0) + 1
            try:
                return cls(folder / FORMAT.format(attempt), attempt)
            except FileExistsError:  # another process began one in between
                continue

    def append(self, event: Event, **fields: Any) -> None:
        """Write one line, and see it to the disk where state depends on it; raises Fenced."""
        self.check_fence()
        line = json.dumps({"t": round(time.time(), 3), "event": event, **fields}, allow_nan=False)
        self._file.write(line + "\n")
        self._file.flush()
        if event in DURABLE:
            os.fsync(self._file.fileno())

    def check_fence(self) -> None:
        """Raise Fenced where a newer attempt exists."""
        if self._next.exists():
            raise Fenced(f"{self._next}: a newer attempt has taken over")

    def close(self) -> None:
        """Close the file; the attempt's last event has been written."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def identify_process() -> dict[str, Any]:
    """What tells this process from any other: host, pid and the time it began."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process_started": psutil.Process().create_time(),
    }


def attempts(directory: Path) -> list[int]:
    """Numbers of the attempts made so far, oldest first."""
    return sorted(
        int(path.stem) for path in (directory / "journal").glob("[0-9]*.jsonl") if path.stem.isdigit()
    )


def read_events(directory: Path) -> Iterator[dict[str, Any]]:
    """Every whole line of every attempt, oldest attempt first, each with its attempt's number."""
    for attempt in attempts(directory):
        for event in read_lines(directory / "journal" / FORMAT.format(attempt)):
            yield {**event, "attempt": attempt}


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole JSON objects of a JSON-lines file; torn or foreign lines are passed over."""
    try:
        with path.open("rb") as file:
            for line in file:
                event = _parse(line)
                if event is not None:
                    yield event
    except FileNotFoundError:
        return


def _parse(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None


@dataclass(frozen=True)
class Progress:
    """What one journal says of its run or series."""

    attempt: int = 0
    state: str | None = None
    """The last event that changed state: started, resumed, preempted, cancelled, finished or failed."""
    step: int = 0
    """Steps done, as far as journalled."""
    steps: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    """Step events by step, each once."""
    evals: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    """Evaluations by step, each once."""
    started: Mapping[str, Any] | None = None
    """The newest attempt's first event: process, layout, versions."""
    result: Mapping[str, Any] | None = None
    """The finished or failed event."""

    @property
    def is_alive(self) -> bool:
        """Whether the process of the newest attempt still runs; only this host's processes can be asked."""
        if self.started is None or self.state not in {Event.STARTED, Event.RESUMED}:
            return False
        return process_is_alive(self.started)


def read_progress(directory: Path) -> Progress:
    """Fold a journal into what it says now."""
    attempt, step = 0, 0
    state: str | None = None
    started: dict[str, Any] | None = None
    result: dict[str, Any] | None = None
    steps: dict[int, dict[str, Any]] = {}
    evals: dict[int, dict[str, Any]] = {}
    for event in read_events(directory):
        attempt, kind = event["attempt"], event["event"]
        if isinstance(event.get("step"), int):
            step = event["step"]
        if kind == Event.STEP:
            steps[step] = event
        elif kind == Event.EVAL:
            evals[step] = event
        elif kind in {Event.STARTED, Event.RESUMED}:
            state, started, result = kind, event, None
        elif kind in {Event.FINISHED, Event.FAILED}:
            state, result = kind, event
        elif kind in {Event.PREEMPTED, Event.CANCELLED}:
            state = kind
    return Progress(attempt, state, step, steps, evals, started, result)


def process_is_alive(identity: Mapping[str, Any]) -> bool:
    """Whether a process journalled by `identify_process` still runs on this host."""
    if identity.get("host") != socket.gethostname():
        return False
    try:
        process = psutil.Process(int(identity["pid"]))
        same = abs(process.create_time() - float(identity["process_started"])) < 1.0
        return same and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, KeyError, ValueError):
        return False


class Control:
    """control.jsonl of a study: what the command line did, appended under a lock."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, event: str, **fields: Any) -> None:
        """Write one line and see it to the disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"t": round(time.time(), 3), "event": event, **fields}, allow_nan=False)
        with FileLock(f"{self.path}.lock"), self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[dict[str, Any]]:
        """Every whole line, oldest first."""
        return list(read_lines(self.path))

    def cancelled(self) -> set[str]:
        """Run ids cancelled and not retried since."""
        found: set[str] = set()
        for event in self.read():
            runs = {str(run) for run in event.get("runs", [])}
            if event["event"] == "cancelled":
                found |= runs
            elif event["event"] == "retried":
                found -= runs
        return found

    def forgiven(self) -> dict[str, int]:
        """For each retried run id, the newest attempt whose failure is forgotten."""
        found: dict[str, int] = {}
        for event in self.read():
            if event["event"] == "retried":
                found |= {str(run): int(attempt) for run, attempt in event.get("attempts", {}).items()}
        return found
