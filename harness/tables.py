"""How results look in a terminal: the tables behind the verbs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

from harness.cost import GIB
from harness.progress import describe
from harness.sheet import Sheet
from harness.status import RunState, RunStatus, count_states
from harness.terminal import counted

if TYPE_CHECKING:
    from harness.bundle_merge import Imported
    from harness.doctor import Finding
    from harness.plan import Plan
    from harness.prune import Item, Pruned
    from harness.rundir import Root

COLOURS = {
    RunState.DONE: "green",
    RunState.RUNNING: "cyan",
    RunState.FAILED: "red",
    RunState.INTERRUPTED: "yellow",
    RunState.CANCELLED: "magenta",
}


def print_plan(console: Console, plan: Plan) -> None:
    """The sizes and the plan as tables, its totals and its notes."""
    _print_sizes(console, plan)
    numbers = (
        "parameters",
        "iterations",
        "tokens",
        "FLOPs",
        "seed",
        "ranks",
        "micro",
        "GiB",
        "disk GiB",
        "time added",
    )
    columns = ("run", "architecture", "size", *numbers, "state")
    table = Sheet(f"plan of {plan.study.name}", columns, numbers)
    for run in plan.runs:
        status = run.status
        table.add_row(
            status.run_id if plan.identified else "-",
            status.point.architecture,
            status.point.size,
            f"{run.cost.n_params:,}",
            f"{status.point.run.iterations:,}",
            short(run.cost.tokens),
            f"{run.cost.flops:.2e}",
            str(status.point.run.seed),
            f"{run.layout.ranks} x ZeRO {run.layout.zero_stage}",
            f"{run.layout.micro_batch} x {run.layout.accumulation}",
            f"{run.memory_gib:.2f}",
            f"{run.disk_gib:.3g}",
            duration(run.wall_hours),
            coloured(status.state),
        )
    table.print(console)
    totals = plan.totals()
    console.print(
        f"{counted(totals['runs'], 'run')} in {counted(totals['series'], 'series')}; to spend "
        f"{totals['gpu_hours']:.4g} GPU-hours, {totals['gpu_hours_independent']:.4g} if no trunk were shared; "
        f"finished already {totals['gpu_hours_reused']:.4g}"
    )
    console.print(
        f"on disk {totals['disk_gib']:.3g} GiB when all is done, {totals['disk_peak_gib']:.3g} GiB on the way there"
    )
    for code, text in plan.notes:
        console.print(f"note {code}: {text}", markup=False)


def _print_sizes(console: Console, plan: Plan) -> None:
    """What each size is, beside the parameters that were asked for and those of a published model, where there are."""
    sizes = [size.as_json() for size in plan.sizes()]
    beside = {
        key: (title, off)
        for key, title, off in (
            ("target_n_params", "asked for", "deviation"),
            ("reference_n_params", "published", "reference_deviation"),
        )
        if any(size[key] is not None for size in sizes)
    }
    numbers = ["blocks", "width", "parameters"]
    for title, _ in beside.values():
        numbers += [title, f"off {title.split()[0]}"]
    table = Sheet(f"sizes of {plan.study.name}", ("size", "architecture", *numbers), numbers)
    for size in sizes:
        cells = [f"{size['n_blocks']}", f"{size['d_model']}", f"{size['n_params']:,}"]
        for key, (_, off) in beside.items():
            known = size[key] is not None
            cells += [f"{size[key]:,.0f}", f"{size[off]:+z.2%}"] if known else ["-", "-"]
        table.add_row(size["size"], size["architecture"], *cells)
    table.print(console)


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
        "busy": done.busy,
        "notes": done.notes,
        "totals": {
            "gib_removed": done.bytes / GIB,
            "gib_kept": sum(item.bytes for item in done.kept) / GIB,
        },
    }


def print_imported(console: Console, name: str, done: Imported) -> None:
    """What an import brought, and what it left."""
    console.print(
        f"study {name}: {counted(len(done.added), 'run')} imported, {len(done.present)} finished here already"
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
