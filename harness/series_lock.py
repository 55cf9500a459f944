"""One process at a time trains a Series: a lock, and who may take a Series over from the holder of the lock.

A scheduler that thinks a node dead starts its job again elsewhere, while the old job may go on and hold the lock. The
same job at a later start goes past the lock; the old one is fenced off by the newer attempt's journals and leaves.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import ValidationError

from harness.run import Frozen, WholeNumber
from harness.rundir import write_atomically


class Holder(Frozen):
    """holder.json of a Series: the scheduler's job that trains it, for its own later starts to know."""

    job_id: str
    start: WholeNumber
    """How often the job had been started before."""


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
    """Keep everybody from training a Series while the block runs; False, and nothing kept, where somebody does."""
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
