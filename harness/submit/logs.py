"""What a run's jobs and workers printed, every file under a heading of its own.

A job's own log, which its scheduler writes, comes first: it has what the setup lines said, why srun could not start,
what was killed for memory or cancelled DUE TO TIME LIMIT. Where a job never got as far as starting a worker it is all
there is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from harness.dispatch.arrays import ArrayStore
from harness.dispatch.ledger import open_backends
from harness.record.root import Root
from harness.record.status import RunStatus

READ_SECONDS = 0.5
"""Time between two looks at the files that are followed."""
FIND_SECONDS = 5.0
"""Time between two looks for further files."""


@dataclass(frozen=True)
class Log:
    """One file and what it is."""

    title: str
    path: Path


def find_logs(root: Root, study_name: str, row: RunStatus) -> list[Log]:
    """The logs that hold anything: of the jobs that were to train a Run, oldest first, then a file a rank.

    Of a job that trains many Series packed also what its controller did.
    """
    folder = root.study(study_name)
    arrays = ArrayStore(folder).read()
    backends = open_backends(folder, arrays)
    found = []
    for array in arrays.values():
        for handle in array.handles() if array.job_id is not None else ():
            if row.run_id in {run_dir.name for run_dir in handle.task.run_dirs}:
                backend = backends[array.name]
                for path in filter(Path.exists, backend.logs(handle)):
                    whose = "controller" if path.name == "controller.log" else f"{backend.scheduler}'s log"
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
    """Print logs, and what is added to any of them or in further ones, until Ctrl-C."""
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
    """Prints what is new in files, with a heading wherever another file goes on."""

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
        self._console.print(text, end="" if text.endswith("\n") else "\n", soft_wrap=True)
        self._offsets[log.path] = offset + len(new)
