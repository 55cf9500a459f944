"""`ssmscale status`, `logs` and `cancel`: a table of all runs, or a display that keeps to the terminal's height."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated

import typer
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from harness.cli.options import JsonOption, RootOption, RunsArgument, StudyArgument
from harness.cli.terminal import Table, coloured
from harness.common.console import console, errors, print_json, warn
from harness.common.format import counted, short
from harness.record.registry import registered
from harness.record.status import RunState, RunStatus, StatusReader, count_states
from harness.submit.cancel import cancel as cancel_runs
from harness.submit.cancel import cancel_jobs_of
from harness.submit.logs import find_logs, follow_logs, print_logs
from harness.submit.monitor import StudyMonitor, StudySnapshot, choose, rows_of
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
    reader = StudyMonitor(registered(study, root))
    if as_json:
        snapshot = reader.read()
        print_json(snapshot.as_json())
    else:
        shown = watch_status(console, reader.read) if watch else reader.read()
        if shown is None:
            return
        snapshot = shown
        if not watch:
            print_status(console, snapshot)
        for note in snapshot.notes:
            errors.print(f"passed over: {note}")
    if snapshot.problem:
        warn(snapshot.problem)


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
    concerned = cancel_runs(resolved.root, resolved.study.name, chosen)
    for scheduler, jobs in cancel_jobs_of(resolved, rows).items():
        console.print(f"{counted(len(jobs), 'job')} taken from {scheduler}: {', '.join(jobs)}")
    cancelled = {row.run_id for row in concerned}
    over = [row for row in chosen if row.run_id not in cancelled]
    for row in over if runs else ():
        console.print(f"run {row.run_id} is not cancelled: {ENDED[row.state]}")
    states = ", ".join(f"{count} {state}" for state, count in count_states(over).items())
    left = f"; of {states} there is nothing to cancel" if states and not runs else ""
    console.print(f"{counted(len(concerned), 'run')} cancelled{left}")


WATCH_SECONDS = 2.0
"""Time between two looks at the journals."""
FIRST = (
    RunState.RUNNING,
    RunState.FAILED,
    RunState.INTERRUPTED,
    RunState.QUEUED,
    RunState.NEW,
    RunState.CANCELLED,
    RunState.DONE,
)
"""What is shown first where not everything has room."""


def print_status(console: Console, snapshot: StudySnapshot) -> None:
    """Where every Run stands, how many stand where, and GPU-hours."""
    _table(snapshot, snapshot.rows).print(console)
    for line in summary(snapshot):
        console.print(line, soft_wrap=True)


def summary(snapshot: StudySnapshot) -> Iterator[Text]:
    """How many Runs stand where; allocations; and GPU-hours used and left, with what is not known of them."""
    yield Text(", ").join(_counted(state, count) for state, count in snapshot.counts.items())
    for job in snapshot.packed_jobs:
        yield from map(Text, job.lines())
    hours, unknown = snapshot.hours, snapshot.hours.unknown
    left = f"{hours.left_as_far_as_known:.3g} left"
    if unknown and unknown == sum(left != 0.0 for left in hours.left.values()):
        left = "what is left is not known before a run has measured its speed"
    elif unknown:
        left += f" and that of {unknown} runs whose speed nobody has measured"
    yield Text(f"GPU-hours: {hours.used_in_all:.3g} used, {left}")


def watch_status(console: Console, read: Callable[[], StudySnapshot]) -> StudySnapshot | None:
    """Show the status again every two seconds until every Run is over or nobody trains any, or Ctrl-C.

    Without a terminal a line tells of each change, and the whole table of the end. Returns the snapshot that ended it,
    None after Ctrl-C. A scheduler that has not answered yet is waited for.
    """
    try:
        return _watch_on_terminal(console, read) if console.is_terminal else _watch_in_lines(console, read)
    except KeyboardInterrupt:  # watching is over; what is watched goes on
        return None


def _watch_on_terminal(console: Console, read: Callable[[], StudySnapshot]) -> StudySnapshot:
    with Live(console=console, auto_refresh=False) as live:
        while True:
            snapshot = read()
            live.update(_Display(snapshot), refresh=True)
            if not snapshot.is_live:
                return snapshot
            time.sleep(WATCH_SECONDS)


def _watch_in_lines(console: Console, read: Callable[[], StudySnapshot]) -> StudySnapshot:
    told = None
    while True:
        snapshot = read()
        if snapshot.is_live and told != (told := (dict(snapshot.counts), snapshot.problem)):
            problem = [Text(f"warning: {snapshot.problem}")] if snapshot.problem else []
            console.print(Text("; ").join([*summary(snapshot), *problem]), soft_wrap=True)
        if not snapshot.is_live:
            print_status(console, snapshot)
            return snapshot
        time.sleep(WATCH_SECONDS)


class _Display:
    """As much of a snapshot as there is room for: what runs and what failed first."""

    def __init__(self, snapshot: StudySnapshot) -> None:
        self.snapshot = snapshot

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        snapshot = self.snapshot
        tail = [*summary(snapshot)]
        if snapshot.problem:
            tail.append(Text(f"warning: {snapshot.problem}", style="yellow"))
        room = max(1, console.size.height - len(tail) - 4)  # title, names, what is not shown, and the cursor
        if len(snapshot.rows) <= room:
            yield _table(snapshot, snapshot.rows)
        else:
            order = sorted(range(len(snapshot.rows)), key=lambda i: FIRST.index(snapshot.rows[i].state))
            shown = set(order[:room])
            yield _table(snapshot, [snapshot.rows[i] for i in sorted(shown)])
            rest = [row for i, row in enumerate(snapshot.rows) if i not in shown]
            counts = ", ".join(f"{count} {state}" for state, count in count_states(rest).items())
            yield Text(f"and {len(rest)} more: {counts}", style="dim", no_wrap=True, overflow="ellipsis")
        for line in tail:
            line.no_wrap, line.overflow = True, "ellipsis"
            yield line


def _table(snapshot: StudySnapshot, rows: Sequence[RunStatus]) -> Table:
    numbers = ("seed", "iterations", "done", "loss", "tokens/s", "GPU-h left")
    columns = ("run", "state", "architecture", "size", *numbers, "reason")
    table = Table(f"study {snapshot.study}", columns, numbers)
    for row in rows:
        loss = row.loss if row.loss is not None else row.train_loss
        left = snapshot.hours.left[row.run_id]
        table.add_row(
            row.run_id,
            coloured(row.state),
            row.point.architecture,
            row.point.size,
            str(row.point.run.seed),
            f"{row.point.run.iterations:,}",
            f"{100 * row.iterations_done // row.point.run.iterations} %",
            "-" if loss is None else f"{loss:.4f}" + ("" if row.loss is not None else " (train)"),
            "-" if row.tokens_per_second is None else short(row.tokens_per_second),
            "?" if left is None else f"{left:.3g}" if left else "-",
            row.reason or "",
        )
    return table


def _counted(state: str, count: int) -> Text:
    return Text(f"{count} {state}", style=coloured(RunState(state))[1] or "")
