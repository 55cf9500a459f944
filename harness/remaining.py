"""What is left of a Series and how far it has come, for whoever decides whether it is worth another start."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from harness.control import Control, cancelled_in, forgiven_in
from harness.journal import Event, Journal, read_progress
from harness.rundir import Root
from harness.series_lock import untrained
from harness.training import checkpoint as checkpoints


def unfinished(run_dirs: Iterable[Path], control: Control) -> list[Path]:
    """Directories of the Runs that are neither over nor cancelled."""
    events = control.read()
    cancelled, forgiven = cancelled_in(events), forgiven_in(events)
    left = []
    for folder in run_dirs:
        progress = read_progress(folder)
        failed = progress.state == Event.FAILED and progress.attempt > forgiven.get(folder.name, 0)
        if progress.state != Event.FINISHED and not failed and folder.name not in cancelled:
            left.append(folder)
    return left


def place(root: Root, series_id: str, run_dirs: Iterable[Path]) -> str:
    """Where a Series stands, as far as it would be resumed from."""
    folders = list(run_dirs)
    done = sum(read_progress(folder).state == Event.FINISHED for folder in folders)
    steps = [
        str(held[-1].marker.step) if (held := checkpoints.marked(folder / "checkpoints")) else "0"
        for folder in [root.series(series_id), *folders]
    ]
    return f"{done} finished, checkpoints at {' '.join(steps)}"


def count_crashes(control: Control, left: Sequence[Path], stands: str) -> int:
    """How often in a row, as of now, the job of these Runs died with nothing gained since."""
    wanted = {folder.name for folder in left}
    count = 0
    for event in control.read():
        if not wanted & set(event.get("runs", ())):
            continue
        if event["event"] == "retried":
            count = 0
        elif event["event"] == "crashed":
            count = count + 1 if event.get("kind") == stands else 0
    return count


def give_up(root: Root, series_id: str, left: Iterable[Path], reason: str) -> None:
    """Write into the journals of these Runs of a Series that they are lost, unless some process trains it."""
    with untrained(root.series(series_id)) as nobody_trains_it:
        for folder in left if nobody_trains_it else ():  # else what that process makes of it counts
            with Journal.open(folder) as journal:
                journal.append(Event.FAILED, reason=reason, kind="lost")
