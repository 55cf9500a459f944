"""control.jsonl of a study: what the command line did to it, appended under a lock."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from harness.common.disk import append_line, naming_a_full_disk
from harness.common.jsonl import read_lines

RUNS_A_LINE = 10_000
"""Runs named in one line: a line of a study's hundred thousand would be too long to be read."""


class Control:
    """The record of submissions, cancellations and retries of one study."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, event: str, **fields: Any) -> None:
        """Write what happened and see it to the disk, many `runs` on several lines; raises DiskFull."""
        now = round(time.time(), 3)
        lines = [json.dumps({"t": now, "event": event, **part}, allow_nan=False) for part in _parts(fields)]
        with naming_a_full_disk(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self.path}.lock"):
                descriptor = os.open(self.path, os.O_CREAT | os.O_APPEND | os.O_RDWR, 0o644)
                try:
                    for line in lines:
                        append_line(descriptor, line.encode() + b"\n", self.path, durable=line is lines[-1])
                finally:
                    os.close(descriptor)

    def read(self) -> list[dict[str, Any]]:
        """Every whole line, oldest first."""
        return list(read_lines(self.path))

    def cancelled(self) -> set[str]:
        """Run ids cancelled and not retried since."""
        return cancelled_in(self.read())


def cancelled_in(events: Iterable[Mapping[str, Any]]) -> set[str]:
    """Run ids cancelled and not retried since, by the lines of a control.jsonl."""
    found: set[str] = set()
    for event in events:
        if event["event"] == "cancelled":
            found |= set(event.get("runs", ()))
        elif event["event"] == "retried":
            found -= set(event.get("runs", ()))
    return found


def attempts_reset_in(events: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """For each retried run id, the newest attempt whose failure counts no more, by the lines of a control.jsonl."""
    found: dict[str, int] = {}
    for event in events:
        if event["event"] == "retried":
            found |= event.get("attempts", {})
    return found


def _parts(fields: dict[str, Any]) -> Iterator[dict[str, Any]]:
    runs, attempts = fields.get("runs", ()), fields.get("attempts")
    if len(runs) <= RUNS_A_LINE:
        yield fields
        return
    for first in range(0, len(runs), RUNS_A_LINE):
        part = runs[first : first + RUNS_A_LINE]
        yield {**fields, "runs": part} | (
            {} if attempts is None else {"attempts": {run: attempts[run] for run in part if run in attempts}}
        )
