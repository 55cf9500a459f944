"""`ssmscale sync`, `prune`, `points`, `export`, `import`: what MLflow and a ROOT keep, and what leaves them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from harness.cli import display as tables
from harness.cli.options import JsonOption, RootOption, StudyArgument
from harness.common.console import console, print_json, warn
from harness.common.format import counted
from harness.record.registry import registered
from harness.record.root import Root
from harness.submit.monitor import begun
from harness.tracking.sync import bring_up_to_date, kept_by, replay


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
        print_json(tables.pruned_document(name, resolved.root, done, dry_run=dry_run))
    else:
        tables.print_pruned(console, name, resolved.root, done, dry_run=dry_run)


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
    tables.print_imported(console, opened.contents.study, done)
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
