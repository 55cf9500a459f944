"""`ssmscale sync`, `prune`, `points`, `export`, `import`: what MLflow and a ROOT keep, and what leaves them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness.cli.options import JsonOption, RootOption, StudyArgument
from harness.cli.terminal import Table
from harness.common.console import console, print_json, warn
from harness.common.format import GIB, counted
from harness.record.registry import registered
from harness.record.root import Root
from harness.submit.monitor import begun
from harness.tracking.sync import bring_up_to_date, kept_by, replay

if TYPE_CHECKING:
    from harness.archive.merge import Imported
    from harness.archive.prune import Item, Pruned


def sync(study: StudyArgument, root: RootOption = None) -> None:
    """Check MLflow against the journals: send what it lacks, merge what is there twice, settle what nobody trains."""
    resolved = registered(study, root)
    rows = begun(resolved)
    tracker, done = replay(resolved, rows)
    warn(*done.notes)
    if done.merged:
        console.print(f"{counted(done.merged, 'run')} that were there twice merged into the oldest")
    if done.settled:
        console.print(f"{counted(done.settled, 'run')} settled that the study lists no more")
    console.print(kept_by(tracker, rows))


def prune(
    study: StudyArgument,
    root: RootOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, remove nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Drop checkpoints no run, trial or extension needs; final weights stay, and so does what retry goes on from."""
    from harness.archive.prune import prune as drop

    resolved = registered(study, root)
    done = drop(resolved, dry_run=dry_run)
    name = resolved.study.name
    if as_json:
        print_json(_pruned_document(name, resolved.root, done, dry_run=dry_run))
    else:
        _print_pruned(name, resolved.root, done, dry_run=dry_run)


def export_study(
    study: StudyArgument,
    out: Annotated[Path, typer.Option("--out", metavar="F.zip", help="The bundle to write.")],
    root: RootOption = None,
) -> None:
    """Write the finished runs of a study into one file: identities, journals and points; no weights."""
    from harness.archive.export import export_bundle

    counts = export_bundle(registered(study, root), out)
    judged = f", {counted(counts.evaluations, 'evaluation')}" if counts.evaluations else ""
    console.print(f"{out}: {counted(counts.runs, 'run')} in {counted(counts.series, 'series')}{judged}")


def import_bundle(
    bundle: Annotated[Path, typer.Argument(metavar="F.zip", help="A bundle `ssmscale export` wrote.")],
    root: RootOption = None,
) -> None:
    """Add a bundle's finished runs to those here; it is checked whole first, and twice is as good as once."""
    from harness.archive.check import open_bundle
    from harness.archive.merge import merge

    place = Root(root or Path("runs"))
    with open_bundle(bundle) as opened:
        done = merge(opened, place)
    _print_imported(opened.contents.study, done)
    if done.busy:
        raise typer.Exit(1)


def points(
    study: StudyArgument,
    root: RootOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write CSV or Parquet, by the name's ending.")
    ] = None,
    on_the_way: Annotated[
        bool,
        typer.Option("--all", help="Add the evaluations made on the way, as rows with annealed=False."),
    ] = False,
) -> None:
    """The table of finished runs, a row a run, as CSV: from the journals, which MLflow is brought up to first."""
    from harness.record.points import check_ending, points_of, write_table

    check_ending(out)
    resolved = registered(study, root)
    rows = begun(resolved)
    bring_up_to_date(resolved, rows)
    write_table(points_of(rows, resolved.root, on_the_way=on_the_way), out, sys.stdout)


def _pruned_document(name: str, root: Root, done: Pruned, *, dry_run: bool) -> dict[str, Any]:
    """Return the document of `ssmscale prune --json`."""
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


def _print_pruned(name: str, root: Root, done: Pruned, *, dry_run: bool) -> None:
    """Print what went and why, what stays and why, and the sum."""
    title = f"{'would go' if dry_run else 'gone'} from {name}"
    if done.removed:
        table = Table(title, ("what", "path", "step", "GiB", "why it goes"), ("step", "GiB"))
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


def _print_imported(name: str, done: Imported) -> None:
    """Print what an import brought, and what it left."""
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
