"""A Series under ROOT: the lock of the one process that trains it, and its state, which decides on another start.

A scheduler that thinks a node dead starts its job again elsewhere, while the old job may go on and hold the lock. The
same job at a later start goes past the lock; the old one is fenced off by the newer attempt's journals and leaves.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import ValidationError

from harness.common.disk import write_atomically
from harness.record import checkpoints
from harness.record.control import Control, attempts_reset_in, cancelled_in
from harness.record.journal import Event, Journal, read_progress
from harness.record.kinds import Kind
from harness.record.root import Root
from harness.study.run import Frozen, WholeNumber


class Holder(Frozen):
    """holder.json of a Series: the scheduler's job that trains it, for its own later starts to know."""

    job_id: str
    start: WholeNumber
    """Starts of the job before this one."""


RAY_JOB = "SSMSCALE_RAY_JOB"
"""Variable with the name of the Ray job this process is part of."""


def scheduler_job() -> Holder | None:
    """The scheduler's job this process is part of, or None."""
    if ray_job := os.environ.get(RAY_JOB):
        return Holder(job_id=ray_job, start=0)
    number = os.environ.get("SLURM_ARRAY_JOB_ID")
    if number is not None:
        job_id = f"{number}_{os.environ.get('SLURM_ARRAY_TASK_ID', '0')}"
    elif (job_id := os.environ.get("SLURM_JOB_ID", "")) == "":
        return None
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    return Holder(job_id=job_id, start=int(restarts) if restarts.isdigit() else 0)


@contextlib.contextmanager
def untrained(series_dir: Path) -> Iterator[bool]:
    """Hold the lock of a Series while the block runs; False, and no lock held, where another process trains it."""
    lock = FileLock(series_dir / "lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


class SeriesLock:
    """The lock of one Series."""

    def __init__(self, series_dir: Path) -> None:
        self._lock = FileLock(series_dir / "lock")
        self._holder = series_dir / "holder.json"

    def acquire(self) -> bool:
        """Take the Series for this process; False where another process trains it that may not be replaced."""
        mine = scheduler_job()
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            if mine is None or not self._is_replaced_by(mine):
                return False
        if mine is not None:
            write_atomically(self._holder, mine.model_dump_json() + "\n")
        else:
            self._holder.unlink(missing_ok=True)
        return True

    def release(self) -> None:
        """Let the Series go."""
        self._lock.release()

    def _is_replaced_by(self, mine: Holder) -> bool:
        with contextlib.suppress(OSError, ValidationError):
            held = Holder.model_validate_json(self._holder.read_bytes())
            return held.job_id == mine.job_id and held.start < mine.start
        return False


def unfinished(run_dirs: Iterable[Path], control: Control) -> list[Path]:
    """Directories of the Runs that are neither over nor cancelled."""
    events = control.read()
    cancelled, reset = cancelled_in(events), attempts_reset_in(events)
    left = []
    for folder in run_dirs:
        progress = read_progress(folder)
        failed = progress.state == Event.FAILED and progress.attempt > reset.get(folder.name, 0)
        if progress.state != Event.FINISHED and not failed and folder.name not in cancelled:
            left.append(folder)
    return left


def place(root: Root, series_id: str, run_dirs: Iterable[Path]) -> str:
    """Describe the state of a Series, as far as it would be resumed from."""
    folders = list(run_dirs)
    done = sum(read_progress(folder).state == Event.FINISHED for folder in folders)
    steps = [
        str(held[-1].marker.step) if (held := checkpoints.marked(folder / "checkpoints")) else "0"
        for folder in [root.series(series_id), *folders]
    ]
    return f"{done} finished, checkpoints at {' '.join(steps)}"


def count_crashes(control: Control, left: Sequence[Path], stands: str) -> int:
    """Count how often in a row, as of now, the job of these Runs died with nothing gained since."""
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
    with untrained(root.series(series_id)) as is_free:
        for folder in left if is_free else ():  # else the result of that process counts
            with Journal.open(folder) as journal:
                journal.append(Event.FAILED, reason=reason, kind=Kind.LOST)
