"""`ssmscale status`, `logs` and `cancel`: how a study does, and taking runs of it back."""

from __future__ import annotations

from typing import Annotated

import typer

from harness import submission, tables
from harness.dispatch.slurm import batch_logs
from harness.opening import choose, jobs_of, registered, rows_of
from harness.options import JsonOption, RootOption, RunsArgument, StudyArgument
from harness.remote import cancel_jobs_of
from harness.status import StatusReader
from harness.terminal import console, counted, errors, print_json
from ssmttm.errors import InputError


def status(
    study: StudyArgument,
    root: RootOption = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show it again every two seconds until all is over.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Where every run of a study stands."""
    resolved = registered(study, root)
    if watch and not as_json:
        tables.watch_status(console, lambda: rows_of(resolved), resolved.study.name)
        return
    reader = StatusReader(resolved.root, resolved.study.name)
    rows = reader.read(resolved.points, jobs=jobs_of(resolved))
    if as_json:
        print_json(tables.status_document(resolved.study.name, rows, reader.notes))
    else:
        tables.print_status(console, resolved.study.name, rows)
        tables.print_notes(errors, reader.notes)


def logs(
    study: StudyArgument,
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run id, or its first digits.")],
    root: RootOption = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on as more is written.")] = False,
) -> None:
    """What a run's workers printed."""
    resolved = registered(study, root)
    row = choose(rows_of(resolved), [run])[0]
    files = submission.log_files(resolved.root, row)
    if not files and row.job_id:  # a job that ended before its ranks began: its batch script may say why
        files = batch_logs(resolved.root.study(resolved.study.name), row.job_id)
    if not files:
        raise InputError(f"run {row.run_id} has no logs: nothing has trained it yet")
    tables.print_logs(console, files, follow=follow)


def cancel(study: StudyArgument, runs: RunsArgument = None, root: RootOption = None) -> None:
    """Cancel runs of a study that are not over; others of the same trunk go on."""
    resolved = registered(study, root)
    rows = rows_of(resolved)
    concerned = submission.cancel(resolved.root, resolved.study.name, choose(rows, runs))
    ended = cancel_jobs_of(resolved, rows)
    if ended:
        console.print(f"{counted(len(ended), 'job')} taken from SLURM: {', '.join(ended)}")
    console.print(f"{counted(len(concerned), 'run')} cancelled")
