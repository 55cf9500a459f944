"""`ssmscale sync`, `prune`, `points`, `export` and `import`: the contents of MLflow and of a ROOT."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from harness.cli.options import DryRunOption, JsonOption, RootOption, StudyArgument
from harness.cli.terminal import Table
from harness.common.console import console, errors, print_json, warn
from harness.common.format import GIB, counted
from harness.record.registry import registered
from harness.record.root import Root
from harness.submit.monitor import begun
from harness.tracking.sync import bring_up_to_date, kept_by, replay

if TYPE_CHECKING:
    from harness.archive.prune import Item, Pruned


def sync(study: StudyArgument, root: RootOption = None) -> None:
    """Correct MLflow by the journals.

    Sends everything that MLflow lacks, merges runs that it holds twice, and ends runs that no process trains.
    """
    resolved = registered(study, root)
    rows = begun(resolved)
    with errors.status("comparing MLflow with the journals"):
        tracker, done = replay(resolved, rows)
    warn(*done.notes)
    if done.merged:
        console.print(f"{counted(done.merged, 'run')} that MLflow held twice merged into the oldest")
    if done.settled:
        console.print(f"{counted(done.settled, 'run')} settled that the study lists no more")
    console.print(kept_by(tracker, rows))


def prune(
    study: StudyArgument,
    root: RootOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Remove checkpoints that no run, trial or extension needs.

    Final weights stay, and so do the checkpoints that `ssmscale retry` goes on from.
    """
    from harness.archive.prune import prune as remove

    resolved = registered(study, root)
    with errors.status("looking for checkpoints") as shown:

        def progress(done: int, total: int) -> None:
            shown.update(f"looking for checkpoints: {done:,} of {total:,} records of this ROOT read")

        done = remove(resolved, dry_run=dry_run, progress=progress)
    name = resolved.study.name
    if as_json:
        print_json(
            {
                "study": name,
                "dry_run": dry_run,
                "removed": [item.as_json(resolved.root) for item in done.removed],
                "kept": [item.as_json(resolved.root) for item in done.kept],
                "trials": done.trials,
                "busy": done.busy,
                "notes": done.notes,
                "totals": {
                    "gib_removed": done.bytes / GIB,
                    "gib_kept": sum(item.bytes for item in done.kept) / GIB,
                },
            }
        )
    else:
        _print_pruned(name, resolved.root, done, dry_run=dry_run)


def export_study(
    study: StudyArgument,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="F.zip", help="The file to write.")],
    root: RootOption = None,
) -> None:
    """Write the finished runs of a study into one file, no weights.

    The file holds the identity, the journal and the scores of each run.
    """
    from harness.archive.export import export_bundle

    with errors.status("reading finished runs"):
        counts = export_bundle(registered(study, root), out)
    judged = f", {counted(counts.evaluations, 'evaluation')}" if counts.evaluations else ""
    console.print(f"{out}: {counted(counts.runs, 'run')} in {counted(counts.series, 'series')}{judged}")


def import_bundle(
    bundle: Annotated[Path, typer.Argument(metavar="F.zip", help="A file that `ssmscale export` wrote.")],
    root: RootOption = None,
) -> None:
    """Add the finished runs of an exported file to those here.

    The whole file is checked before anything is written. Importing it again changes nothing.
    """
    from harness.archive.check import open_bundle
    from harness.archive.merge import merge

    place = Root(root or Path("runs"))
    with errors.status(f"checking {bundle}") as shown, open_bundle(bundle) as opened:
        shown.update("adding runs")
        done = merge(opened, place)
    judged = f", {counted(done.evaluations, 'evaluation')} added" if done.evaluations else ""
    name, added = opened.contents.study, counted(len(done.added), "run")
    console.print(f"study {name}: {added} imported, {len(done.present)} finished here already{judged}")
    for series_id in done.busy:
        console.print(
            f"series {series_id} is in training here: nothing of it was imported; import again later"
        )
    for note in done.notes:
        console.print(f"note: {note}")
    if done.busy:
        raise typer.Exit(1)


def points(
    study: StudyArgument,
    root: RootOption = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="Write CSV or Parquet, by the name's ending."),
    ] = None,
    on_the_way: Annotated[
        bool,
        typer.Option("--all", help="Add evaluations taken mid-run, as rows with annealed=False."),
    ] = False,
) -> None:
    """Write a table of finished runs as CSV, a row a run.

    The rows come from the journals. MLflow is brought up to date first.
    """
    from harness.record.points import check_output, points_of, write_table

    check_output(out, ".csv", ".parquet")
    resolved = registered(study, root)
    rows = begun(resolved)
    with errors.status("bringing MLflow up to date"):
        bring_up_to_date(resolved, rows)
    write_table(points_of(rows, resolved.root, on_the_way=on_the_way), out, sys.stdout)


def _print_pruned(name: str, root: Root, done: Pruned, *, dry_run: bool) -> None:
    """Print a row for each removed item, a line for each reason to keep items, and the sum."""
    title = f"{'would go' if dry_run else 'gone'} from {name}"
    if done.removed:
        table = Table(title, ("of", "path", "step", "GiB", "reason"), ("step", "GiB"))
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
        console.print(f"including {counted(len(done.trials), 'series')} of its tuning")
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
