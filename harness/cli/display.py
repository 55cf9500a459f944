"""Progress of long work: bars in a terminal, plain lines in a file or a pipe."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from harness.cli.terminal import listed
from harness.common.format import counted, hint
from harness.record.status import OVER, RunState, RunStatus, count_states
from ssmttm.corpus import progress


class _Display:
    """Progress bars, in a terminal only."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: Progress | None = None
        if console.is_terminal and not console.is_dumb_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self._bars = Progress(*columns, console=console)

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop updating the display; may be called again."""
        if self._bars is not None:
            self._bars.stop()


class StudyProgress(_Display):
    """Progress of a study: all Runs, and each Series in training."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._tasks: dict[str, TaskID] = {}
        self._over: dict[str, RunState] | None = None

    def show(self, rows: Sequence[RunStatus]) -> None:
        """Update the display to these rows."""
        if self._bars is None:
            self._print_news(rows)
            return
        self._update("", "all runs", sum(row.state in OVER for row in rows), len(rows), "")
        running: dict[str, RunStatus] = {}
        for row in rows:
            if row.state is RunState.RUNNING:
                running[row.series_id] = row  # the longest Run stands for its Series
        for series_id, row in running.items():
            name = f"{row.point.architecture} {row.point.size} seed {row.point.run.seed}"
            note = f"loss {row.train_loss:.3f}" if row.train_loss is not None else "starting"
            self._update(series_id, name, row.iterations_done, row.point.run.iterations, note)
        for key in [key for key in self._tasks if key and key not in running]:
            self._bars.remove_task(self._tasks.pop(key))

    def _update(self, key: str, name: str, done: int, total: int, note: str) -> None:
        assert self._bars is not None
        if key not in self._tasks:
            self._tasks[key] = self._bars.add_task(name, total=total, note=note)
        self._bars.update(self._tasks[key], completed=done, total=total, note=note)

    def _print_news(self, rows: Sequence[RunStatus]) -> None:
        over = {row.run_id: row.state for row in rows if row.state in OVER}
        if self._over is not None:
            for row in rows:
                if row.run_id in over and self._over.get(row.run_id) != row.state:
                    self._console.print(f"[{len(over)}/{len(rows)}] {describe(row)}", highlight=False)
        self._over = over


class StageProgress(_Display, progress.Progress):
    """Progress of work in stages, such as building a corpus."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._task: TaskID | None = None
        self._name, self._done, self._total, self._printed = "", 0, 0, 0
        self._began, self._audio = time.monotonic(), 0.0

    def stage(self, name: str, total: int, done: int) -> None:
        """Begin a stage; `done` of its `total` pieces are there already."""
        self._name, self._done, self._total, self._printed = name, done, total, done
        self._began, self._audio = time.monotonic(), 0.0
        if self._bars is not None:
            self._task = self._bars.add_task(name, total=total, completed=done, note="")
        else:
            self._print()

    def advance(self, seconds: float = 0.0) -> None:
        """Count one piece as done, which holds so many seconds of audio."""
        self._done += 1
        self._audio += seconds
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, completed=self._done, note=self._speed())
        elif self._done - self._printed >= max(1, self._total // 4) or self._done == self._total:
            self._printed = self._done
            self._print()

    def _print(self) -> None:
        speed = f", {self._speed()}" if self._audio else ""
        self._console.print(f"{self._name}: {self._done}/{self._total}{speed}", highlight=False)

    def _speed(self) -> str:
        """Return how much audio the stage has read in a second; empty if it reads none."""
        return progress.speed(self._audio, time.monotonic() - self._began)


def print_summary(console: Console, name: str, rows: Sequence[RunStatus], root: Path) -> None:
    """Print a line about a study, and one about each Run that failed."""
    console.print(f"study {name}: {counted(len(rows), 'run')}, {listed(count_states(rows))}")
    for row in rows:
        if row.state is RunState.FAILED:
            console.print(f"  {row.run_id} {describe(row)}")
    if any(row.state in {RunState.FAILED, RunState.CANCELLED} for row in rows):
        console.print(f"{hint('retry', name, root=root)} trains failed and cancelled runs again")


def describe(row: RunStatus) -> str:
    """Return a line about a Run."""
    name = f"{row.point.architecture} {row.point.size} seed {row.point.run.seed}, {row.point.run.iterations} iterations"
    if row.state is RunState.DONE and row.loss is not None:
        return f"{name}: loss {row.loss:.4f}"
    return f"{name}: {row.state}" + (f" ({row.reason})" if row.reason else "")
