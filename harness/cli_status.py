"""`ssmscale status`, `logs`, `cancel` and `doctor`: how a study and a machine do, and taking runs back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from harness import submission, tables
from harness.logs import find_logs, follow_logs, print_logs
from harness.opening import choose, registered, rows_of
from harness.options import ClusterOption, JsonOption, RootOption, RunsArgument, StudyArgument
from harness.reading import StudyReader
from harness.remote import cancel_jobs_of
from harness.status import RunState, StatusReader, count_states
from harness.status_table import print_status, watch_status
from harness.terminal import console, counted, errors, print_json, warn
from ssmttm.errors import InputError

ENDED = {
    RunState.DONE: "it has finished, and what it found stays",
    RunState.FAILED: "it has failed, and nothing of it is trained until `ssmscale retry`",
    RunState.CANCELLED: "it was cancelled before",
}
"""Why there is nothing to cancel of a Run, by its state."""


def status(
    study: StudyArgument,
    root: RootOption = None,
    watch: Annotated[
        bool,
        typer.Option("--watch", help="Show it until all is over; SLURM is asked every 20 s at most."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Where every run of a study stands."""
    reader = StudyReader(registered(study, root))
    if as_json:
        reading = reader.read()
        print_json(reading.as_json())
    else:
        shown = watch_status(console, reader.read) if watch else reader.read()
        if shown is None:
            return
        reading = shown
        if not watch:
            print_status(console, reading)
        tables.print_notes(errors, reading.notes)
    if reading.problem:
        warn(reading.problem)


def logs(
    study: StudyArgument,
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run id, or its first digits.")],
    root: RootOption = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on as more is written.")] = False,
) -> None:
    """What a run's workers printed, and SLURM about its jobs."""
    resolved = registered(study, root)
    name = resolved.study.name
    row = choose(StatusReader(resolved.root, name).read(resolved.points), [run])[0]
    found = find_logs(resolved.root, name, row)
    if not found:
        (now,) = choose(rows_of(resolved), [row.run_id])
        why = f", {now.reason}" if now.reason else ""
        raise InputError(f"run {row.run_id} has no logs: nothing has trained it yet, it is {now.state}{why}")
    if follow:
        follow_logs(console, lambda: find_logs(resolved.root, name, row))
    else:
        print_logs(console, found)


def cancel(study: StudyArgument, runs: RunsArgument = None, root: RootOption = None) -> None:
    """Cancel runs of a study that are not over; others of the same trunk go on."""
    resolved = registered(study, root, fetch=True)  # what is cancelled needs an identity
    rows = rows_of(resolved)
    chosen = choose(rows, runs)
    concerned = submission.cancel(resolved.root, resolved.study.name, chosen)
    ended = cancel_jobs_of(resolved, rows)
    for whose, jobs in (
        ("SLURM", [job for job in ended if job[0].isdigit()]),
        ("Ray", [job for job in ended if not job[0].isdigit()]),
    ):
        if jobs:
            console.print(f"{counted(len(jobs), 'job')} taken from {whose}: {', '.join(jobs)}")
    cancelled = {row.run_id for row in concerned}
    over = [row for row in chosen if row.run_id not in cancelled]
    for row in over if runs else ():
        console.print(f"run {row.run_id} is not cancelled: {ENDED[row.state]}", markup=False)
    states = ", ".join(f"{count} {state}" for state, count in count_states(over).items())
    left = f"; of {states} there is nothing to cancel" if states and not runs else ""
    console.print(f"{counted(len(concerned), 'run')} cancelled{left}", markup=False)


def doctor(root: RootOption = None, cluster: ClusterOption = None, as_json: JsonOption = False) -> None:
    """What of this machine, and of a cluster that is named, works, and what to do about the rest."""
    from harness.doctor import examine

    findings = examine(root or Path("runs"), cluster)
    if as_json:
        print_json({"checks": [finding.model_dump() for finding in findings]})
    else:
        tables.print_doctor(console, findings)
    if any(finding.needed and not finding.works for finding in findings):
        raise typer.Exit(1)
