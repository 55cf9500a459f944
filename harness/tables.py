"""How results look in a terminal: the tables behind the verbs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

from harness.memory import GIB
from harness.progress import describe
from harness.sheet import Sheet
from harness.status import RunState, RunStatus, count_states
from harness.terminal import counted

if TYPE_CHECKING:
    from harness.bundle_merge import Imported
    from harness.doctor import Finding
    from harness.prune import Item, Pruned
    from harness.rundir import Root

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
        console.print(f"passed over: {note}", markup=False)


def print_summary(console: Console, name: str, rows: Sequence[RunStatus]) -> None:
    """One line a study is left with, and one for each Run that failed."""
    counts = ", ".join(f"{count} {state}" for state, count in count_states(rows).items())
    console.print(f"study {name}: {len(rows)} runs, {counts}")
    for row in rows:
        if row.state is RunState.FAILED:
            console.print(f"  {row.run_id} {describe(row)}", markup=False)
    if any(row.state in {RunState.FAILED, RunState.CANCELLED} for row in rows):
        console.print(f"`ssmscale retry {name}` trains what failed or was cancelled", markup=False)


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
        console.print(f"stays: {_counted_items(items)}, {size:.4f} GiB: {why}", markup=False)
    if done.trials:
        console.print(f"with {counted(len(done.trials), 'series')} that its tuning had trained")
    for series_id in done.busy:
        console.print(f"series {series_id} is in training: left alone")
    for note in done.notes:
        console.print(f"note: {note}", markup=False)
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
        console.print(f"note: {note}", markup=False)


def print_doctor(console: Console, findings: Sequence[Finding]) -> None:
    """What works, and for the rest what to do."""
    for finding in findings:
        mark = (
            "[green]ok[/]  " if finding.works else ("[red]no[/]  " if finding.needed else "[yellow]no[/]  ")
        )
        console.print(f"{mark}{finding.name}: ", end="")
        console.print(finding.found, markup=False, end="")
        console.print(f" -> {finding.remedy}" if finding.remedy else "", markup=False)


def duration(hours: float) -> str:
    """A time with two digits and a unit: 0.34 s, 12 min, 5.1 h."""
    seconds = hours * 3600
    for limit, unit in ((3600.0, "h"), (60.0, "min")):
        if seconds >= limit:
            return f"{seconds / limit:.3g} {unit}"
    return f"{seconds:.2g} s"


def short(number: float) -> str:
    """A count with three digits and a unit: 1.23M."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.3g}"


def coloured(state: RunState) -> tuple[str, str | None]:
    """A state as a sheet's cell."""
    return str(state), COLOURS.get(state)
