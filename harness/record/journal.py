"""Journals of runs and series: append-only JSON lines, one file an attempt, from which all state is derived.

An attempt opens journal/NNNN.jsonl with O_EXCL, so two processes never share a file. A process that finds the file of a
newer attempt was thought dead and has been replaced: it is fenced, and writes nothing more.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple, Self

from pydantic import ValidationError

from harness.common.disk import DiskFull, append_line, make_folder, naming_a_full_disk, sync_to_disk
from harness.common.jsonl import Damage, LineReader
from harness.common.process import process_is_alive
from harness.common.validation import first_mistake
from harness.record.kinds import Kind, kind_of
from harness.record.result import Result
from harness.record.root import layout_differences

FORMAT = "{:04d}.jsonl"
ATTEMPT = re.compile(r"([0-9]{4}|[1-9][0-9]{4,8})\.jsonl")
MOST_NOTES = 20
"""Damaged lines of one journal that are named; the rest are counted."""


class Event(StrEnum):
    """The `event` of a journal's line."""

    STARTED = "started"
    RESUMED = "resumed"
    STEP = "step"
    EVAL = "eval"
    SYSTEM = "system"
    CHECKPOINT = "checkpoint"
    PREEMPTED = "preempted"
    CANCELLED = "cancelled"
    FINISHED = "finished"
    FAILED = "failed"
    WARNING = "warning"


OPEN = frozenset({Event.STARTED, Event.RESUMED})
"""Events that begin an attempt."""
DURABLE = frozenset(Event) - {Event.STEP, Event.EVAL, Event.SYSTEM, Event.WARNING}
"""Events that are flushed to the disk before training continues."""
REQUIRED = {Event.STEP: ("step", "loss"), Event.EVAL: ("step", "loss"), Event.SYSTEM: ("step",)}
"""Fields without which an event is invalid."""


class Fenced(RuntimeError):
    """A newer attempt has taken over; the older one writes nothing more and ends."""


class Journal(contextlib.AbstractContextManager["Journal"]):
    """The journal of one attempt, open for appending."""

    def __init__(self, path: Path, attempt: int) -> None:
        self.path = path
        self.attempt = attempt
        self._next = path.with_name(FORMAT.format(attempt + 1))
        with naming_a_full_disk(path):
            self._descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_RDWR, 0o666)
            sync_to_disk(path.parent)

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Begin the next attempt on the run or series of `directory`; raises DiskFull."""
        make_folder(directory / "journal")
        while True:
            attempt = max(attempts(directory), default=0) + 1
            try:
                return cls(attempt_file(directory, attempt), attempt)
            except FileExistsError:  # another process began one meanwhile
                continue

    def append(self, event: Event, **fields: Any) -> None:
        """Append one line, whole or not at all, and flush durable events; raises Fenced or DiskFull."""
        self.check_fence()
        line = json.dumps({"t": round(time.time(), 3), "event": event, **fields}, allow_nan=False)
        append_line(self._descriptor, line.encode() + b"\n", self.path, durable=event in DURABLE)

    def sync(self) -> None:
        """Flush the journal to the disk before a checkpoint is saved, which must not be ahead of it."""
        with naming_a_full_disk(self.path):
            os.fsync(self._descriptor)

    def leave(self, kind: Kind, reason: str) -> None:
        """Append the preempted event, unless the disk is full or the attempt is fenced, and close."""
        with contextlib.suppress(DiskFull, Fenced, OSError):
            self.append(Event.PREEMPTED, reason=reason, kind=kind)
        self.close()

    def check_fence(self) -> None:
        """Raise Fenced if a newer attempt exists."""
        if self._next.exists():
            raise Fenced(f"{self._next}: a newer attempt has taken over")

    def close(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __exit__(self, *_: object) -> None:
        self.close()


def attempts(directory: Path) -> list[int]:
    """Return the numbers of all attempts, oldest first."""
    return [file.attempt for file in _attempt_files(directory)]


def attempt_file(directory: Path, attempt: int) -> Path:
    """Return the path of the journal of one attempt on the run or series of `directory`."""
    return Path(directory, "journal", FORMAT.format(attempt))


class Span(NamedTuple):
    """Time of one attempt, from its first event to its newest."""

    begun: float
    ended: float
    job_id: str | None
    ranks: int
    gpu_share: float = 1.0
    """Share of a GPU that each rank had."""


class LayoutChange(NamedTuple):
    """A difference of layout between two attempts: losses agree with an undisturbed training to rounding alone."""

    step: int
    """Newest step of the earlier layout."""
    text: str


@dataclass(frozen=True)
class Progress:
    """State of a run or series by its journal."""

    attempt: int = 0
    state: str | None = None
    """The last event that changed state: started, resumed, preempted, cancelled, finished or failed."""
    step: int = 0
    """Newest step."""
    steps: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    """Newest step event of each step."""
    evals: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    """Newest evaluation of each step."""
    started: Mapping[str, Any] | None = None
    """First event of the newest attempt: process, layout, versions."""
    result: Mapping[str, Any] | None = None
    """The finished or failed event."""
    systems: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    """Use of the first rank's machine, by step."""
    stopped_by: str | None = None
    """Reason why the newest attempt was preempted: the signal's name."""
    kind: Kind | None = None
    """Kind of that reason, or of its failure."""
    spans: tuple[Span, ...] = ()
    """Time of every attempt, oldest first."""
    changes: tuple[LayoutChange, ...] = ()
    """Changes of layout between its attempts, oldest first."""
    damaged: tuple[str, ...] = ()
    """A sentence for each skipped line, with file, line and reason."""

    @property
    def is_alive(self) -> bool:
        """True if the newest attempt is open and its process runs on this host."""
        return self.started is not None and self.is_open and process_is_alive(self.started)

    @property
    def is_open(self) -> bool:
        """True if the newest attempt has no final event: it trains, or its process died."""
        return self.state in OPEN

    @property
    def is_of_another_host(self) -> bool:
        """True if the newest attempt is open and its process was on another host, where it may run or have died."""
        return self.started is not None and self.is_open and self.started.get("host") != socket.gethostname()

    def is_trained_by(self, job_id: str) -> bool:
        """True if a running job's process is that of the newest attempt, as far as this host can know."""
        if self.started is None or not self.is_open or self.started.get("job_id") != job_id:
            return False
        return self.is_alive or self.is_of_another_host


def read_progress(directory: Path) -> Progress:
    """Read the journal of a run or series."""
    return ProgressReader().read(directory)


class ProgressReader:
    """Reads journals repeatedly, each time only the lines appended since.

    With `newest_only` it keeps only the highest step of each kind of event: all steps of ten thousand Runs take
    gigabytes.
    """

    def __init__(self, *, newest_only: bool = False) -> None:
        self._newest_only = newest_only
        self._held: dict[Path, _Fold] = {}

    def read(self, directory: Path) -> Progress:
        """Return the progress by a journal: the same object as before if nothing was written since."""
        found = _attempt_files(directory)
        fold = self._held.get(directory)
        if fold is None or not fold.is_continued_by(found):
            fold = self._held[directory] = _Fold(directory, newest_only=self._newest_only)
        return fold.read(found)


class _AttemptFile(NamedTuple):
    attempt: int
    size: int
    modified: int
    inode: int


class _Fold:
    """State of one journal, as far as it was read."""

    def __init__(self, directory: Path, *, newest_only: bool) -> None:
        self.newest_only = newest_only
        self.directory = directory
        self.check = check_for(directory)
        self.files: list[_AttemptFile] = []
        self.reader: LineReader | None = None
        self.progress = Progress()
        self.held: dict[str, dict[int, dict[str, Any]]] = {Event.STEP: {}, Event.EVAL: {}, Event.SYSTEM: {}}
        """Repeated events, by step."""
        self.attempt, self.step = 0, 0
        self.state: dict[str, Any] = {}
        """Fields of the progress that follow from events that change the state."""
        self.spans: list[Span] = []
        self.changes: list[LayoutChange] = []
        self.notes: list[str] = []
        self.unnamed = 0
        self.is_partial = False
        """True if a file could not be read, and must be read again even if it does not change."""

    def is_continued_by(self, found: list[_AttemptFile]) -> bool:
        """True if the files have only grown: the older ones are unchanged, the newest is longer or as long."""
        if self.is_partial or not self.files:
            return not self.is_partial
        *older, newest = self.files
        if len(found) < len(self.files) or found[: len(older)] != older:
            return False
        now, offset = found[len(older)], self.reader.offset if self.reader else 0
        return (now.attempt, now.inode) == (newest.attempt, newest.inode) and now.size >= offset

    def read(self, found: list[_AttemptFile]) -> Progress:
        if found == self.files and not (self.reader and self.reader.torn):
            return self.progress
        before = self.reader and replace(self.reader)
        for attempt, *_ in found[max(len(self.files) - 1, 0) :]:
            if self.reader is None or self.reader.path.name != FORMAT.format(attempt):
                if self.reader is not None and self.reader.torn:
                    self._note(self.reader, self.reader.number + 1, "torn")
                self.reader = LineReader(attempt_file(self.directory, attempt))
            self._take_in(attempt, self.reader)
        self.files = found
        if self.reader != before or self.is_partial:
            self.progress = self._progress()
        return self.progress

    def _take_in(self, attempt: int, reader: LineReader) -> None:
        try:
            for line in reader.read(self.check):
                if isinstance(line, Damage):
                    self._note(reader, line.number, line.why)
                else:
                    self._add(attempt, line)
        except OSError as error:
            self._note(reader, reader.number + 1, f"cannot be read ({error.strerror})")
            self.is_partial = True

    def _note(self, reader: LineReader, number: int, why: str) -> None:
        note = f"{reader.path} line {number}: {why}"
        if note in self.notes:
            return
        if len(self.notes) < MOST_NOTES:
            self.notes.append(note)
        else:
            self.unnamed += 1

    def _add(self, attempt: int, event: dict[str, Any]) -> None:
        event["attempt"] = self.attempt = attempt
        name, now = event["event"], event["t"]
        self.step = event.get("step", self.step)
        if name in OPEN:
            ranks = event.get("layout", {}).get("ranks", 1)
            self.spans.append(Span(now, now, event.get("job_id"), ranks, event.get("gpu_share", 1.0)))
        # A clock may be set back; what is noted of a later attempt that never began is not this one's time.
        elif self.spans and self.state.get("state") in OPEN and now > self.spans[-1].ended:
            self.spans[-1] = self.spans[-1]._replace(ended=now)
        if name in self.held:
            held = self.held[name]
            if self.newest_only and held:
                if self.step < max(held):
                    return
                held.clear()
            held[self.step] = event
        elif name in OPEN:
            if self.step > 0:
                found = layout_differences(self.state.get("started", {}), event)
                self.changes += [LayoutChange(self.step, text) for text in found]
            self.state = {"state": name, "started": event}
        elif name in {Event.FINISHED, Event.FAILED}:
            self.state |= {"state": name, "result": event, "kind": kind_of(event)}
        elif name in {Event.PREEMPTED, Event.CANCELLED}:
            self.state |= {"state": name, "stopped_by": event.get("reason"), "kind": kind_of(event)}

    def _progress(self) -> Progress:
        notes = list(self.notes)
        if self.unnamed:
            notes.append(f"{self.directory}/journal: {self.unnamed} more lines are skipped")
        if self.reader is not None and self.reader.torn:
            notes.append(f"{self.reader.path} line {self.reader.number + 1}: torn")
        return Progress(
            **self.state,
            attempt=self.attempt,
            step=self.step,
            steps=dict(self.held[Event.STEP]),  # copies, which do not grow with the journal
            evals=dict(self.held[Event.EVAL]),
            systems=dict(self.held[Event.SYSTEM]),
            spans=tuple(self.spans),
            changes=tuple(self.changes),
            damaged=tuple(notes),
        )


def _attempt_files(directory: Path) -> list[_AttemptFile]:
    found = []
    try:
        with os.scandir(f"{directory}/journal") as entries:
            for entry in entries:
                if match := ATTEMPT.fullmatch(entry.name):
                    facts = entry.stat()
                    found.append(_AttemptFile(int(match[1]), facts.st_size, facts.st_mtime_ns, facts.st_ino))
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(found)


def check_for(directory: Path) -> Callable[[dict[str, Any]], None]:
    """Return a function that raises ValueError for a line that lacks a field its event needs."""
    is_run = directory.parent.name not in {"series", "parts"}

    def check(fields: dict[str, Any]) -> None:
        event = fields["event"]
        for name in REQUIRED.get(event, ()):
            if name not in fields:
                raise ValueError(f"{name}: is missing in a {event} event")
        if is_run and event == Event.FINISHED:
            try:
                Result.of_event(fields)
            except ValidationError as error:
                raise ValueError(f"{first_mistake(error)}, so the run is not finished") from None

    return check
