"""The run's own record: append-only JSON lines, one file an attempt, from which all state is derived.

An attempt opens journal/NNNN.jsonl with O_EXCL, so two processes never share one. A newer attempt fences older
ones: a process that finds a younger file beside its own stops writing, because it was thought dead and has been
replaced. A line that is torn or damaged is passed over and named. A step seen by two attempts counts once, the later
one's word; attempts are ordered by their numbers and never by a clock.
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
from typing import Any, Self

from pydantic import ValidationError

from harness.common.disk import DiskFull, append_line, make_folder, naming_a_full_disk, sync_to_disk
from harness.common.jsonl import Damage, LineReader
from harness.common.process import process_is_alive
from harness.common.validation import first_mistake
from harness.record.kinds import Kind, kind_of
from harness.record.result import Result

FORMAT = "{:04d}.jsonl"
ATTEMPT = re.compile(r"([0-9]{4}|[1-9][0-9]{4,8})\.jsonl")
MOST_NOTES = 20
"""Damaged lines of one journal that are named; the others are counted."""


class Event(StrEnum):
    """What a line of a journal tells."""

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


DURABLE = frozenset(Event) - {Event.STEP, Event.EVAL, Event.SYSTEM, Event.WARNING}
"""Events that must be on disk before training goes on."""
NEEDED: Mapping[str, tuple[str, ...]] = {
    Event.STEP: ("step", "loss"),
    Event.EVAL: ("step", "loss"),
    Event.SYSTEM: ("step",),
}
"""Fields without which an event says nothing."""


class Fenced(RuntimeError):
    """A newer attempt has taken over; whoever is told so writes nothing more and leaves."""


class Journal:
    """The journal of one attempt, open for appending."""

    def __init__(self, path: Path, attempt: int) -> None:
        self.path = path
        self.attempt = attempt
        self._next = path.with_name(FORMAT.format(attempt + 1))
        with naming_a_full_disk(path):
            self._descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_RDWR, 0o644)
            sync_to_disk(path.parent)

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Begin a new attempt on the run or series of `directory`; raises DiskFull."""
        make_folder(directory / "journal")
        while True:
            attempt = max(attempts(directory), default=0) + 1
            try:
                return cls(attempt_file(directory, attempt), attempt)
            except FileExistsError:  # another process began one in between
                continue

    def append(self, event: Event, **fields: Any) -> None:
        """Write one line, whole or not at all, and see it to the disk where state depends on it.

        Raises Fenced, and DiskFull; the journal may be written to again after either.
        """
        self.check_fence()
        line = json.dumps({"t": round(time.time(), 3), "event": event, **fields}, allow_nan=False)
        append_line(self._descriptor, line.encode() + b"\n", self.path, durable=event in DURABLE)

    def sync(self) -> None:
        """See all that was written to the disk: what is about to be saved must not be ahead of its record."""
        with naming_a_full_disk(self.path):
            os.fsync(self._descriptor)

    def leave(self, kind: Kind, reason: str) -> None:
        """Say that this attempt trains no more and has not failed, where there is room for that much, and close."""
        with contextlib.suppress(DiskFull, Fenced, OSError):
            self.append(Event.PREEMPTED, reason=reason, kind=kind)
        self.close()

    def check_fence(self) -> None:
        """Raise Fenced where a newer attempt exists."""
        if self._next.exists():
            raise Fenced(f"{self._next}: a newer attempt has taken over")

    def close(self) -> None:
        """Close the file; the attempt's last event has been written."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def attempts(directory: Path) -> list[int]:
    """Numbers of the attempts made so far, oldest first."""
    return [attempt for attempt, _ in _attempt_files(directory)]


def attempt_file(directory: Path, attempt: int) -> Path:
    """The journal of one attempt on the run or series of `directory`."""
    return directory / "journal" / FORMAT.format(attempt)


@dataclass
class Span:
    """When one attempt was at work, as far as it told."""

    begun: float
    ended: float
    job_id: str | None
    ranks: int
    gpu_share: float = 1.0
    """Share of a GPU each rank had, where others trained on it too."""


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
    systems: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    """What the first rank used of its machine, by step, each once."""
    stopped_by: str | None = None
    """Why the newest attempt stopped, where it did: the signal's name."""
    kind: Kind | None = None
    """The kind of that, or of its failure."""
    spans: tuple[Span, ...] = ()
    """Every attempt, oldest first, from its first event to its newest."""
    damaged: tuple[str, ...] = ()
    """Lines that were passed over, a sentence each: file, line and why."""

    @property
    def is_alive(self) -> bool:
        """Whether the process of the newest attempt still runs; only this host's processes can be asked."""
        return self.started is not None and self.is_open and process_is_alive(self.started)

    @property
    def is_open(self) -> bool:
        """Whether the newest attempt has told of no end: it trains, or its process went without a word."""
        return self.state in {Event.STARTED, Event.RESUMED}

    def is_trained_by(self, job_id: str) -> bool:
        """Whether a scheduler's job that runs has this in hand, as far as can be told from here."""
        if self.started is None or not self.is_open or self.started.get("job_id") != job_id:
            return False
        return self.is_alive or self.started.get("host") != socket.gethostname()


def read_progress(directory: Path) -> Progress:
    """Fold a journal into what it says now."""
    return ProgressReader().read(directory)


class ProgressReader:
    """Reads journals again and again, each time only what has been appended.

    With `newest_only` it holds the highest step of each kind of event and no others: all steps of ten thousand Runs
    take gigabytes, and where a Run stands is told by the last.
    """

    def __init__(self, *, newest_only: bool = False) -> None:
        self._newest_only = newest_only
        self._held: dict[Path, _Fold] = {}

    def read(self, directory: Path) -> Progress:
        """What a journal says now; the same object as before where nothing has been written since."""
        found = _attempt_files(directory)
        fold = self._held.get(directory)
        if fold is None or not fold.is_continued_by(found):
            fold = self._held[directory] = _Fold(directory, newest_only=self._newest_only)
        return fold.read(found)


@dataclass(frozen=True)
class _FileFacts:
    """What changes when a file does."""

    size: int
    modified: int
    inode: int


_Files = list[tuple[int, _FileFacts]]


class _Fold:
    """One journal, folded as far as it was read."""

    def __init__(self, directory: Path, *, newest_only: bool) -> None:
        self.newest_only = newest_only
        self.folder = directory / "journal"
        self.check = check_for(directory)
        self.files: _Files = []
        self.reader: LineReader | None = None
        self.progress = Progress()
        self.held: dict[str, dict[int, dict[str, Any]]] = {Event.STEP: {}, Event.EVAL: {}, Event.SYSTEM: {}}
        """Events that come again and again, by step."""
        self.attempt, self.step = 0, 0
        self.stands = Progress()
        """What events that change the state tell."""
        self.spans: list[Span] = []
        self.notes: list[str] = []
        self.unnamed = 0
        self.is_partial = False
        """Whether something could not be read: it may be another time, though no file has changed."""

    def is_continued_by(self, found: _Files) -> bool:
        """Whether reading on gives what reading from the start would: older files as they were, the newest grown."""
        if self.is_partial:
            return False
        if not self.files:
            return True
        last = len(self.files) - 1
        if len(found) <= last or found[:last] != self.files[:last]:
            return False
        (attempt, now), (known, before) = found[last], self.files[last]
        offset = self.reader.offset if self.reader else 0
        return attempt == known and now.inode == before.inode and now.size >= offset

    def read(self, found: _Files) -> Progress:
        if found == self.files and not (self.reader and self.reader.torn):
            return self.progress
        news, torn = False, self.reader is not None and self.reader.torn
        for attempt, _ in found[max(len(self.files) - 1, 0) :]:
            if self.reader is None or self.reader.path.name != FORMAT.format(attempt):
                if self.reader is not None and self.reader.torn:
                    self._note(self.reader, self.reader.number + 1, "torn")
                self.reader = LineReader(self.folder / FORMAT.format(attempt))
                news = True
            news |= self._take_in(attempt, self.reader)
        self.files = found
        still_torn = self.reader is not None and self.reader.torn
        if news or torn != still_torn:
            self.progress = self._progress()
        return self.progress

    def _take_in(self, attempt: int, reader: LineReader) -> bool:
        news = False
        try:
            for line in reader.read(self.check):
                news = True
                if isinstance(line, Damage):
                    self._note(reader, line.number, line.why)
                else:
                    self._add(attempt, line)
        except OSError as error:
            self._note(reader, reader.number + 1, f"cannot be read ({error.strerror})")
            self.is_partial = True
            return True
        return news

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
        if name in {Event.STARTED, Event.RESUMED}:
            ranks = event.get("layout", {}).get("ranks", 1)
            self.spans.append(Span(now, now, event.get("job_id"), ranks, event.get("gpu_share", 1.0)))
        elif self.spans and now > self.spans[-1].ended:  # a clock may be set back
            self.spans[-1].ended = now
        if name in self.held:
            self._hold(self.held[name], event)
        elif name in {Event.STARTED, Event.RESUMED}:
            self.stands = Progress(state=name, started=event)
        elif name in {Event.FINISHED, Event.FAILED}:
            self.stands = replace(self.stands, state=name, result=event, kind=kind_of(event))
        elif name in {Event.PREEMPTED, Event.CANCELLED}:
            reason = event.get("reason")
            self.stands = replace(self.stands, state=name, stopped_by=reason, kind=kind_of(event))

    def _hold(self, held: dict[int, dict[str, Any]], event: dict[str, Any]) -> None:
        if self.newest_only and held:
            if self.step < max(held):
                return
            held.clear()
        held[self.step] = event

    def _progress(self) -> Progress:
        notes = list(self.notes)
        if self.unnamed:
            notes.append(f"{self.folder}: {self.unnamed} more lines are passed over")
        if self.reader is not None and self.reader.torn:
            notes.append(f"{self.reader.path} line {self.reader.number + 1}: torn")
        # Copies: what was handed out stays as it is while the journal grows.
        return replace(
            self.stands,
            attempt=self.attempt,
            step=self.step,
            steps=dict(self.held[Event.STEP]),
            evals=dict(self.held[Event.EVAL]),
            systems=dict(self.held[Event.SYSTEM]),
            spans=tuple(replace(span) for span in self.spans),
            damaged=tuple(notes),
        )


def _attempt_files(directory: Path) -> _Files:
    """The files of a journal, oldest attempt first, with what changes when they are written to."""
    found = []
    try:
        with os.scandir(directory / "journal") as entries:
            for entry in entries:
                if match := ATTEMPT.fullmatch(entry.name):
                    facts = entry.stat()
                    known = _FileFacts(facts.st_size, facts.st_mtime_ns, facts.st_ino)
                    found.append((int(match[1]), known))
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(found, key=lambda file: file[0])


def check_for(directory: Path) -> Callable[[dict[str, Any]], None]:
    """What raises ValueError for a line whose fields are right and which still is none of this journal's."""
    is_run = directory.parent.name != "series"

    def check(fields: dict[str, Any]) -> None:
        kind = fields["event"]
        for name in NEEDED.get(kind, ()):
            if name not in fields:
                raise ValueError(f"{name}: a {kind} without it says nothing")
        if is_run and kind == Event.FINISHED:
            try:
                Result.of_event(fields)
            except ValidationError as error:
                raise ValueError(f"{first_mistake(error)}, so the run is not finished") from None

    return check
