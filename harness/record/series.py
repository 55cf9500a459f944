"""A Series under ROOT: the lock of the one process that trains it, and the state that decides on another start.

A scheduler may restart a job while its old process still holds the lock on a node believed dead. The new start ignores
that lock, and its journals fence off the old process.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from filelock import Timeout
from pydantic import ValidationError

from harness.common.disk import write_atomically
from harness.record import checkpoints
from harness.record.control import Control, attempts_reset_in, cancelled_in
from harness.record.journal import Event, Journal, read_progress
from harness.record.kinds import Kind
from harness.record.root import Root
from harness.study.run import Frozen, WholeNumber
from ssmttm.files import read_document
from ssmttm.locks import file_lock, is_held


class Holder(Frozen):
    """holder.json of a Series: the scheduler's job that trains it, which a later start of that job reads."""

    job_id: str
    start: WholeNumber
    """Number of earlier starts of the job."""


RAY_JOB = "SSMSCALE_RAY_JOB"
"""Environment variable with the name of this process's Ray job."""


def scheduler_job() -> Holder | None:
    """Return the scheduler's job that this process belongs to, or None."""
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
    """Hold the lock of a Series during the block and yield True; yield False if another process holds it."""
    lock = file_lock(series_dir / "lock", wait=False)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    except PermissionError:  # of a reader, who changes nothing
        yield not is_held(series_dir / "lock")
        return
    try:
        yield True
    finally:
        lock.release()


class SeriesLock:
    """Lock of a Series for the process that trains it."""

    def __init__(self, series_dir: Path) -> None:
        self._lock = file_lock(series_dir / "lock", wait=False)
        self._holder = series_dir / "holder.json"

    def acquire(self) -> bool:
        """Lock the Series and return True; False if a process trains it that this one may not replace."""
        mine = scheduler_job()
        try:
            self._lock.acquire()
        except Timeout:
            if mine is None or not self._is_replaced_by(mine):
                return False
        if mine is not None:
            write_atomically(self._holder, mine.model_dump_json() + "\n")
        else:
            self._holder.unlink(missing_ok=True)
        return True

    def release(self) -> None:
        """Release the lock."""
        self._lock.release()

    def _is_replaced_by(self, mine: Holder) -> bool:
        with contextlib.suppress(OSError, ValidationError):
            held = Holder.model_validate_json(read_document(self._holder))
            return held.job_id == mine.job_id and held.start < mine.start
        return False


def unfinished(run_dirs: Iterable[Path], control: Control) -> list[Path]:
    """Return the directories of the Runs that are neither over nor cancelled."""
    events = control.read()
    cancelled, reset = cancelled_in(events), attempts_reset_in(events)

    def is_over(folder: Path) -> bool:
        progress = read_progress(folder)
        failed = progress.state == Event.FAILED and progress.attempt > reset.get(folder.name, 0)
        return failed or progress.state == Event.FINISHED

    return [folder for folder in run_dirs if folder.name not in cancelled and not is_over(folder)]


def place(root: Root, series_id: str, run_dirs: Iterable[Path]) -> str:
    """Describe the state that a Series would be resumed from."""
    folders = list(run_dirs)
    done = sum(read_progress(folder).state == Event.FINISHED for folder in folders)
    steps = [
        str(held[-1].marker.step) if (held := checkpoints.marked(folder / "checkpoints")) else "0"
        for folder in [root.series(series_id), *folders]
    ]
    return f"{done} finished, checkpoints at {' '.join(steps)}"


def count_crashes(control: Control, left: Sequence[Path], stands: str) -> int:
    """Count the newest crashes in a row of these Runs' jobs that left the Series in the state `stands`."""
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


def note_stall(root: Root, series_id: str, run_dirs: Iterable[Path], reason: str) -> None:
    """Journal that the ranks of a Series were ended because nothing moved, unless another process trains it."""
    folders = [root.series(series_id), *run_dirs]
    with untrained(folders[0]) as is_free:
        for folder in folders if is_free else ():
            if folder == folders[0] or read_progress(folder).is_open:
                with Journal.open(folder) as journal:
                    journal.append(Event.PREEMPTED, reason=reason, kind=Kind.STALLED)


def give_up(root: Root, series_id: str, left: Iterable[Path], reason: str) -> None:
    """Journal these Runs of a Series as failed with kind LOST, unless a process trains the Series."""
    with untrained(root.series(series_id)) as is_free:
        for folder in left if is_free else ():
            with Journal.open(folder) as journal:
                journal.append(Event.FAILED, reason=reason, kind=Kind.LOST)
