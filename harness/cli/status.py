"""`ssmscale status`, `logs` and `cancel`: tables of runs, and a display that keeps to the terminal's height."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated

import typer
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from harness.cli.options import (
    EveryRunOption,
    JsonOption,
    RootOption,
    RunArgument,
    RunsArgument,
    StudyArgument,
)
from harness.cli.terminal import COLOURS, Table, coloured, listed
from harness.common.console import console, errors, print_json, warn
from harness.common.format import counted, hint, short
from harness.record.jobs import SchedulerUnavailable
from harness.record.registry import registered
from harness.record.status import RunState, RunStatus, StatusReader, count_states, to_rounding
from harness.submit.cancel import cancel as cancel_runs
from harness.submit.cancel import cancel_jobs_of, wanted_by_others
from harness.submit.logs import find_logs, follow_logs, print_logs
from harness.submit.monitor import StudyMonitor, StudySnapshot, choose, rows_of
from ssmttm.errors import InputError

ENDED = {
    RunState.DONE: "it has finished, and its result stays",
    RunState.FAILED: "it has failed, and is not trained again before it is retried",
    RunState.CANCELLED: "it was cancelled before",
}
"""Reason why a Run cannot be cancelled, by its state."""


def status(
    study: StudyArgument,
    root: RootOption = None,
    watch: Annotated[
        bool,
        typer.Option(
            "--watch", "-w", help="Update it until all runs are over; asks SLURM every 20 s at most."
        ),
    ] = False,
    every_run: EveryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show the state of a study's runs.

    The first table has a row for each size and architecture, the second a row for each run that failed or was
    interrupted.
    """
    reader = StudyMonitor(registered(study, root))
    if as_json:
        snapshot = reader.read()
        print_json(snapshot.as_json())
    else:
        last = watch_status(console, reader.read, every_run=every_run) if watch else reader.read()
        if last is None:
            return
        snapshot = last
        if not watch:
            print_status(console, snapshot, every_run=every_run)
        for note in snapshot.notes:
            errors.print(f"passed over: {note}")
    if snapshot.problem:
        warn(snapshot.problem)


def logs(
    study: StudyArgument,
    run: RunArgument,
    root: RootOption = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Print new lines as they are written.")
    ] = False,
) -> None:
    """Print the logs of a run and of its jobs."""
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
    """Cancel runs that are not over; other runs of their series go on."""
    resolved = registered(study, root, fetch=True)  # a run is cancelled by its id
    rows = rows_of(resolved)
    chosen = choose(rows, runs)
    concerned = cancel_runs(resolved.root, resolved.study.name, chosen)
    try:
        ended, kept = cancel_jobs_of(resolved, rows)
        for scheduler, jobs in ended.items():
            console.print(f"{counted(len(jobs), 'job')} taken from {scheduler}: {', '.join(jobs)}")
        for job in kept:
            console.print(f"job {job} goes on: runs of other studies have joined it")
    except SchedulerUnavailable as gone:
        warn(
            f"{gone.scheduler}: {gone}; jobs of cancelled runs are not taken from it: running ones leave these runs at "
            "their next step, and waiting ones end when they start; repeat the command to take them away"
        )
    for run_id, studies in wanted_by_others(resolved, concerned).items():
        console.print(f"run {run_id} is trained for study {', '.join(studies)} all the same")
    cancelled = {row.run_id for row in concerned}
    over = [row for row in chosen if row.run_id not in cancelled]
    for row in over if runs else ():
        console.print(f"run {row.run_id} is not cancelled: {ENDED[row.state]}")
    left = "" if runs or not over else f"; not cancelled: {listed(count_states(over))}"
    console.print(f"{counted(len(concerned), 'run')} cancelled{left}")


WATCH_SECONDS = 2.0
"""Time between two readings of the journals."""
FIRST = (
    RunState.RUNNING,
    RunState.FAILED,
    RunState.INTERRUPTED,
    RunState.QUEUED,
    RunState.NEW,
    RunState.CANCELLED,
    RunState.DONE,
)
"""Order in which a display that is too small for all runs shows them."""
NEED_THE_USER = (RunState.FAILED, RunState.INTERRUPTED)
"""States that end by `retry` or `submit` alone."""
MOST_NAMED = 10
"""Runs that need the user and are shown one by one; --runs shows all."""


def print_status(console: Console, snapshot: StudySnapshot, *, every_run: bool = False) -> None:
    """Print a row for each size, or for each Run, the Runs that need the user, and sums."""
    if every_run:
        _run_table(snapshot, snapshot.rows).print(console)
    else:
        _size_table(snapshot).print(console)
        _print_needs(console, snapshot)
    for line in summary(snapshot):
        console.print(line, soft_wrap=not console.is_terminal)
    if said := to_rounding(snapshot.rows):
        console.print(said, soft_wrap=not console.is_terminal)


def _size_table(snapshot: StudySnapshot) -> Table:
    groups: dict[tuple[str, str], list[RunStatus]] = {}
    for row in snapshot.rows:
        groups.setdefault((row.point.size, row.point.architecture), []).append(row)
    numbers = ("trained", "lowest loss", "GPU-h left")
    title = f"study {snapshot.study}; --runs shows each run"
    table = Table(title, ("size", "architecture", "runs", *numbers), numbers)
    for (size, architecture), rows in groups.items():
        counts = count_states(rows)
        first = min((row.state for row in rows), key=FIRST.index)
        iterations = sum(row.point.run.iterations for row in rows)
        losses = [row.loss for row in rows if row.loss is not None]
        left = [snapshot.hours.left[row.run_id] for row in rows]
        table.add_row(
            size,
            architecture,
            (listed(counts), COLOURS.get(first)),
            f"{100 * sum(row.iterations_done for row in rows) // iterations} %",
            f"{min(losses):.4f}" if losses else "-",
            "?" if None in left else _hours(sum(hours for hours in left if hours is not None)),
        )
    return table


def _print_needs(console: Console, snapshot: StudySnapshot) -> None:
    """Print the Runs that failed or were interrupted, and what to do about them."""
    rows = sorted(
        (row for row in snapshot.rows if row.state in NEED_THE_USER),
        key=lambda row: NEED_THE_USER.index(row.state),
    )
    if not rows:
        return
    table = Table("runs that need you", ("run", "state", "details"))
    for row in rows[:MOST_NAMED]:
        run = row.point.run
        name = f"{row.point.size} {row.point.architecture} seed {run.seed}"
        trained = f"{row.iterations_done:,} of {counted(run.iterations, 'iteration')}"
        table.add_row(
            row.run_id, coloured(row.state), f"{name}, {trained}: {row.reason or 'no reason is known'}"
        )
    table.print(console)
    if len(rows) > MOST_NAMED:
        console.print(f"and {len(rows) - MOST_NAMED:,} more: {listed(count_states(rows[MOST_NAMED:]))}")
    name = snapshot.study
    again = hint("submit", name, *snapshot.options, root=snapshot.root)
    remedies = {
        RunState.FAILED: f"{hint('retry', name, root=snapshot.root)} trains failed runs again",
        RunState.INTERRUPTED: f"{again} goes on with interrupted runs",
    }
    states = {row.state for row in rows}
    for state, remedy in remedies.items():
        if state in states:
            console.print(remedy, soft_wrap=True)  # the terminal breaks a command so that it can be copied


def summary(snapshot: StudySnapshot) -> Iterator[Text]:
    """Yield the number of Runs in each state, the allocations, and GPU-hours used and left as far as known."""
    states = (
        (f"{count:,} {state}", COLOURS.get(RunState(state)) or "") for state, count in snapshot.counts.items()
    )
    yield Text(", ").join(Text(*state) for state in states)
    if still := [row for row in snapshot.rows if row.still_seconds is not None]:
        series = counted(len({row.series_id for row in still}), "series")
        longest = max(still, key=lambda row: row.still_seconds or 0.0)
        yield Text(f"nothing moves in {series}: run {longest.run_id}, {longest.reason}", "red")
    for job in snapshot.packed_jobs:
        yield from map(Text, job.lines())
    if bad := snapshot.bad_nodes:
        yield Text(f"{counted(len(bad), 'bad node')} avoided: {'; '.join(map(str, bad))}")
        yield Text("`ssmscale doctor --forget-node NODE` uses a repaired node again")
    hours, unknown = snapshot.hours, snapshot.hours.unknown
    left = f"{hours.left_as_far_as_known:.3g} left"
    if unknown and unknown == sum(left != 0.0 for left in hours.left.values()):
        left = "hours left are not known before a run has measured its speed"
    elif unknown:
        left += f", without {counted(unknown, 'run')} of unknown speed"
    shared = f" ({hours.used_by_shared:.3g} of them for other studies too)" if hours.used_by_shared else ""
    yield Text(f"GPU-hours: {hours.used_in_all:.3g} used{shared}, {left}")


def watch_status(
    console: Console, read: Callable[[], StudySnapshot], *, every_run: bool = False
) -> StudySnapshot | None:
    """Show the status again every two seconds until every Run is over, no process trains any, or Ctrl-C.

    Without a terminal, print a line for each change and the whole status at the end. Returns the last snapshot, None
    after Ctrl-C. A scheduler that has not answered yet is waited for.
    """
    try:
        if console.is_terminal and not console.is_dumb_terminal:
            return _watch_on_terminal(console, read)
        return _watch_in_lines(console, read, every_run=every_run)
    except KeyboardInterrupt:  # training goes on
        return None


def _watch_on_terminal(console: Console, read: Callable[[], StudySnapshot]) -> StudySnapshot:
    with Live(console=console, auto_refresh=False) as live:
        while True:
            snapshot = read()
            live.update(_Display(snapshot), refresh=True)
            if not snapshot.is_live:
                return snapshot
            time.sleep(WATCH_SECONDS)


def _watch_in_lines(console: Console, read: Callable[[], StudySnapshot], *, every_run: bool) -> StudySnapshot:
    printed = None
    while True:
        snapshot = read()
        if not snapshot.is_live:
            print_status(console, snapshot, every_run=every_run)
            return snapshot
        if printed != (printed := (dict(snapshot.counts), snapshot.problem)):
            problem = [Text(f"warning: {snapshot.problem}")] if snapshot.problem else []
            console.print(Text("; ").join([*summary(snapshot), *problem]), soft_wrap=True)
        time.sleep(WATCH_SECONDS)


class _Display:
    """The rows of a snapshot that fit in the terminal, running and failed Runs first."""

    def __init__(self, snapshot: StudySnapshot) -> None:
        self.snapshot = snapshot

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        snapshot = self.snapshot
        tail = [*summary(snapshot)]
        if snapshot.problem:
            tail.append(Text(f"warning: {snapshot.problem}", style="yellow"))
        fit = max(
            1, console.size.height - len(tail) - 4
        )  # title, names, count of further runs, and the cursor
        if len(snapshot.rows) <= fit:
            yield _run_table(snapshot, snapshot.rows)
        else:
            order = sorted(range(len(snapshot.rows)), key=lambda i: FIRST.index(snapshot.rows[i].state))
            shown = set(order[:fit])
            yield _run_table(snapshot, [snapshot.rows[i] for i in sorted(shown)])
            rest = [row for i, row in enumerate(snapshot.rows) if i not in shown]
            yield Text(
                f"and {len(rest):,} more: {listed(count_states(rest))}",
                style="dim",
                no_wrap=True,
                overflow="ellipsis",
            )
        for line in tail:
            line.no_wrap, line.overflow = True, "ellipsis"
            yield line


def _run_table(snapshot: StudySnapshot, rows: Sequence[RunStatus]) -> Table:
    numbers = ("seed", "iterations", "trained", "loss", "tokens/s", "GPU-h left")
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
            _trained(row),
            "-" if loss is None else f"{loss:.4f}" + ("" if row.loss is not None else " (train)"),
            "-" if row.tokens_per_second is None else short(row.tokens_per_second),
            "?" if left is None else _hours(left),
            row.reason or "",
        )
    return table


def _trained(row: RunStatus) -> str:
    return f"{100 * row.iterations_done // row.point.run.iterations} %"


def _hours(left: float) -> str:
    return f"{left:.3g}" if left else "-"
