"""Print the logs of a run's jobs and workers, each under a heading.

The log of a job, which its scheduler writes, comes first: it holds the output of the setup lines, failures of srun, and
processes killed for memory or cancelled DUE TO TIME LIMIT. If the job started no worker there is no other log.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from harness.dispatch.arrays import ArrayStore
from harness.dispatch.ledger import open_backends
from harness.record.control import joined_in
from harness.record.root import Root
from harness.record.series import STUDY
from harness.record.status import RunStatus

READ_SECONDS = 0.5
"""Interval between two readings of followed files."""
FIND_SECONDS = 5.0
"""Interval between two searches for new files."""


@dataclass(frozen=True)
class Log:
    """A log file and its heading."""

    title: str
    path: Path


def find_logs(root: Root, study_name: str, row: RunStatus) -> list[Log]:
    """Return the logs of a Run that are not empty: those of its jobs, oldest first, then one of each rank.

    A packed job also has the log of its controller.
    """
    joined = joined_in(root.control(study_name).read()).get(row.run_id)
    found = []
    for study, only in [(study_name, None), *([joined] if joined and STUDY.fullmatch(joined[0]) else [])]:
        folder = root.study(study)
        arrays = ArrayStore(folder).read()
        backends = open_backends(folder, arrays)
        for array in arrays.values():
            for handle in array.handles() if array.job_id is not None else ():
                is_given = row.run_id in {run_dir.name for run_dir in handle.task.run_dirs}
                is_joined = array.name == only and handle.task.series_id == row.series_id
                if is_joined or (only is None and is_given):
                    backend = backends[array.name]
                    for path in filter(Path.exists, backend.logs(handle)):
                        whose = (
                            "controller" if path.name == "controller.log" else f"{backend.scheduler}'s log"
                        )
                        found.append(Log(f"{whose} of job {handle.job_id}", path))
    ranks = sorted((root.series(row.series_id) / "logs").glob("rank-*.log"))
    found += [Log(f"worker, {path.stem.replace('-', ' ')}", path) for path in ranks]
    return [log for log in found if log.path.stat().st_size]


def print_logs(console: Console, logs: Sequence[Log]) -> None:
    """Print logs one after the other."""
    printer = _Printer(console)
    for log in logs:
        printer.print_news(log)


def follow_logs(console: Console, find: Callable[[], Sequence[Log]]) -> None:
    """Print logs, then lines that are added to them and new logs, until Ctrl-C."""
    printer, logs, found = _Printer(console), find(), time.monotonic()
    try:
        while True:
            for log in logs:
                printer.print_news(log)
            time.sleep(READ_SECONDS)
            if time.monotonic() - found > FIND_SECONDS:
                logs, found = find(), time.monotonic()
    except KeyboardInterrupt:
        return


class _Printer:
    """Prints the new lines of files, with a heading whenever the file changes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._offsets: dict[Path, int] = {}
        self._last: Path | None = None

    def print_news(self, log: Log) -> None:
        offset = self._offsets.get(log.path, 0)
        with log.path.open("rb") as file:
            file.seek(offset)
            new = file.read()
        if not new:
            return
        if log.path != self._last:
            self._console.print(f"==> {log.title}: {log.path} <==", style="bold", soft_wrap=True)
            self._last = log.path
        text = new.decode("utf-8", errors="replace")
        # Of escape codes only colours are kept.
        shown = Text.from_ansi(text, end="\n") if "\x1b" in text else text
        self._console.print(shown, end="" if text.endswith("\n") else "\n", soft_wrap=True)
        self._offsets[log.path] = offset + len(new)
