"""How results look in a terminal: the tables behind the verbs.

How long work shows itself: bars in a terminal, plain lines where output goes to a file or a pipe.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from harness.cli.terminal import Sheet
from harness.common.format import GIB, counted
from harness.record.status import OVER, RunState, RunStatus, count_states

if TYPE_CHECKING:
    from harness.archive.merge import Imported
    from harness.archive.prune import Item, Pruned
    from harness.doctor.machine import Finding
    from harness.record.root import Root

COLOURS = {
    RunState.DONE: "green",
    RunState.RUNNING: "cyan",
    RunState.FAILED: "red",
    RunState.INTERRUPTED: "yellow",
    RunState.CANCELLED: "magenta",
}


def print_notes(console: Console, notes: Sequence[str]) -> None:
    """What was passed over in journals, a line each; nothing where all is whole."""
    for note in notes:
        console.print(f"passed over: {note}")


def print_summary(console: Console, name: str, rows: Sequence[RunStatus]) -> None:
    """One line a study is left with, and one for each Run that failed."""
    counts = ", ".join(f"{count} {state}" for state, count in count_states(rows).items())
    console.print(f"study {name}: {len(rows)} runs, {counts}")
    for row in rows:
        if row.state is RunState.FAILED:
            console.print(f"  {row.run_id} {describe(row)}")
    if any(row.state in {RunState.FAILED, RunState.CANCELLED} for row in rows):
        console.print(f"`ssmscale retry {name}` trains what failed or was cancelled")


def print_pruned(console: Console, name: str, root: Root, done: Pruned, *, dry_run: bool) -> None:
    """What went and why, what stays and why, and the sum."""
    title = f"{'would go' if dry_run else 'gone'} from {name}"
    if done.removed:
        table = Sheet(title, ("what", "path", "step", "GiB", "why it goes"), ("step", "GiB"))
        for item in done.removed:
            path = str(item.path.relative_to(root.path))
            table.add_row(
                item.owner,
                path,
                "" if item.step is None else f"{item.step:,}",
                f"{item.bytes / GIB:.4f}",
                item.why,
            )
        table.print(console)
    reasons: dict[str, list[Item]] = {}
    for item in done.kept:
        reasons.setdefault(item.why, []).append(item)
    for why, items in reasons.items():
        size = sum(item.bytes for item in items) / GIB
        console.print(f"stays: {_counted_items(items)}, {size:.4f} GiB: {why}")
    if done.trials:
        console.print(f"with {counted(len(done.trials), 'series')} that its tuning had trained")
    for series_id in done.busy:
        console.print(f"series {series_id} is in training: left alone")
    for note in done.notes:
        console.print(f"note: {note}")
    verb = "would be freed; nothing was removed" if dry_run else "freed"
    console.print(f"{_counted_items(done.removed)}, {done.bytes / GIB:.4f} GiB {verb}")


def _counted_items(items: Sequence[Item]) -> str:
    copies = sum(item.step is None for item in items)
    parts = [] if copies and copies == len(items) else [counted(len(items) - copies, "checkpoint")]
    if copies:
        parts.append("1 copy of the code" if copies == 1 else f"{copies} copies of the code")
    return " and ".join(parts)


def pruned_document(name: str, root: Root, done: Pruned, *, dry_run: bool) -> dict[str, Any]:
    """The document of `ssmscale prune --json`."""
    return {
        "study": name,
        "dry_run": dry_run,
        "removed": [item.as_json(root) for item in done.removed],
        "kept": [item.as_json(root) for item in done.kept],
        "trials": done.trials,
        "busy": done.busy,
        "notes": done.notes,
        "totals": {
            "gib_removed": done.bytes / GIB,
            "gib_kept": sum(item.bytes for item in done.kept) / GIB,
        },
    }


def print_imported(console: Console, name: str, done: Imported) -> None:
    """What an import brought, and what it left."""
    judged = f", {counted(done.evaluations, 'evaluation')} added" if done.evaluations else ""
    console.print(
        f"study {name}: {counted(len(done.added), 'run')} imported, {len(done.present)} finished here already{judged}"
    )
    for series_id in done.busy:
        console.print(
            f"series {series_id} is in training here: nothing of it was imported; import again later"
        )
    for note in done.notes:
        console.print(f"note: {note}")


def print_doctor(console: Console, findings: Sequence[Finding]) -> None:
    """What works, and for the rest what to do."""
    for finding in findings:
        colour = "green" if finding.works else "red" if finding.needed else "yellow"
        remedy = f" -> {finding.remedy}" if finding.remedy else ""
        mark = ("ok" if finding.works else "no", colour)
        console.print(Text.assemble(mark, f"  {finding.name}: {finding.found}{remedy}"))


def coloured(state: RunState) -> tuple[str, str | None]:
    """A state as a sheet's cell."""
    return str(state), COLOURS.get(state)


class _Display:
    """Bars where there is a terminal, and none where there is not."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: Progress | None = None
        if console.is_terminal:
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
        """Leave the display as it is now; may be called again."""
        if self._bars is not None:
            self._bars.stop()


class StudyProgress(_Display):
    """Progress of a study: all Runs, and each Series in training."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._tasks: dict[str, TaskID] = {}
        self._over: dict[str, RunState] | None = None

    def show(self, rows: Sequence[RunStatus]) -> None:
        """Bring the display to where the study stands."""
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


def describe(row: RunStatus) -> str:
    """One Run in a line."""
    name = f"{row.point.architecture} {row.point.size} seed {row.point.run.seed}, {row.point.run.iterations} iterations"
    if row.state is RunState.DONE and row.loss is not None:
        return f"{name}: loss {row.loss:.4f}"
    return f"{name}: {row.state}" + (f" ({row.reason})" if row.reason else "")


class StageProgress(_Display):
    """Progress of work in stages, such as building a corpus."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._task: TaskID | None = None
        self._name, self._done, self._total, self._told = "", 0, 0, 0

    def stage(self, name: str, total: int, done: int) -> None:
        """A stage begins; `done` of its `total` pieces are there already."""
        self._name, self._done, self._total, self._told = name, done, total, done
        if self._bars is not None:
            self._task = self._bars.add_task(name, total=total, completed=done, note="")
        else:
            self._tell()

    def advance(self, pieces: int = 1) -> None:
        """Some pieces are done."""
        self._done += pieces
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, completed=self._done)
        elif self._done - self._told >= max(1, self._total // 4) or self._done == self._total:
            self._told = self._done
            self._tell()

    def _tell(self) -> None:
        self._console.print(f"{self._name}: {self._done}/{self._total}", highlight=False)
