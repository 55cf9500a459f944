"""control.jsonl of a study: the log of what the command line did to it, appended under a lock."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from harness.common.disk import append_line, appending, make_folder, naming_a_full_disk
from harness.common.jsonl import read_lines
from ssmttm.locks import file_lock

RUNS_A_LINE = 10_000
"""Largest number of Runs in one line: a line with a study's hundred thousand would be too long to read."""


class Control:
    """The record of submissions, cancellations and retries of one study."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, event: str, **fields: Any) -> None:
        """Write an event and flush it to the disk, many `runs` on several lines; raises DiskFull."""
        now = round(time.time(), 3)
        lines = [json.dumps({"t": now, "event": event, **part}, allow_nan=False) for part in _parts(fields)]
        with naming_a_full_disk(self.path):
            make_folder(self.path.parent)
            with file_lock(Path(f"{self.path}.lock")), appending(self.path) as descriptor:
                for line in lines:
                    append_line(descriptor, line.encode() + b"\n", self.path, durable=line is lines[-1])

    def read(self) -> list[dict[str, Any]]:
        """Return every valid line, oldest first."""
        return list(read_lines(self.path))

    def cancelled(self) -> set[str]:
        """Return the ids of Runs that were cancelled and not retried since."""
        return cancelled_in(self.read())


def cancelled_in(events: Iterable[Mapping[str, Any]]) -> set[str]:
    """Return the ids of Runs that the events of a control.jsonl cancelled and did not retry since."""
    found: set[str] = set()
    for event in events:
        if event["event"] == "cancelled":
            found |= set(event.get("runs", ()))
        elif event["event"] == "retried":
            found -= set(event.get("runs", ()))
    return found


def attempts_reset_in(events: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Return the newest attempt whose failure no longer counts, by the id of each retried Run."""
    found: dict[str, int] = {}
    for event in events:
        if event["event"] == "retried":
            found |= event.get("attempts", {})
    return found


def joined_in(events: Iterable[Mapping[str, Any]]) -> dict[str, tuple[str, str]]:
    """Return the study and the array that each Run joined, by run id, unless it was submitted by itself since."""
    found: dict[str, tuple[str, str]] = {}
    for event in events:
        if event["event"] == "submitted":
            with_whom = event.get("joined")
            held = with_whom if isinstance(with_whom, dict) else {}
            study, array = held.get("study"), held.get("array")
            for run_id in event.get("runs", ()):
                found.pop(run_id, None)
                if isinstance(study, str) and isinstance(array, str):
                    found[run_id] = study, array
    return found


def _parts(fields: dict[str, Any]) -> Iterator[dict[str, Any]]:
    runs = fields.get("runs", ())
    if len(runs) <= RUNS_A_LINE:
        yield fields
        return
    for first in range(0, len(runs), RUNS_A_LINE):
        part = {**fields, "runs": runs[first : first + RUNS_A_LINE]}
        if attempts := fields.get("attempts"):
            part["attempts"] = {run: attempts[run] for run in part["runs"] if run in attempts}
        yield part
