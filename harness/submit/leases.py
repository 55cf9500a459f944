"""Who is to train a Series: a lease file made with O_EXCL, so that two submissions never hand over the same one.

A lease names the array of jobs it was made for. It ends when those jobs have, or when they turn out never to have
been submitted; whoever finds that takes the lease away by renaming it, which one process alone can do.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

from pydantic import ValidationError

from harness.common.disk import DISK_THREADS, drop_draft, naming_a_full_disk, side_by_side, sync_to_disk
from harness.common.process import identify_process
from harness.dispatch.base import Task
from harness.dispatch.ledger import Ledger, is_given_up, open_ledger
from harness.record.jobs import SchedulerUnavailable
from harness.record.root import Root
from harness.study.run import Frozen


class Lease(Frozen):
    """claim.json of a Series."""

    study: str
    """The study that leases it, by name."""
    array: str
    """Name of the array of jobs it was made for."""
    process: dict[str, Any]
    """Who made it, as process.identify_process says."""
    t: float
    """When it was made, seconds since 1970."""


NOBODYS = Lease(study="", array="", process={}, t=0.0)
"""What a damaged lease is read as."""


def acquire(series_dir: Path, lease: Lease) -> bool:
    """Lease a Series; False where another lease is there. Raises DiskFull."""
    path = series_dir / "claim.json"
    draft = path.with_name(f".claim.{uuid.uuid4().hex[:8]}")
    try:
        with naming_a_full_disk(path), draft.open("x", encoding="utf-8") as file:
            file.write(lease.model_dump_json() + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.link(draft, path)  # whole when it appears, and refused where there is one
        sync_to_disk(series_dir)
    except FileExistsError:
        return False
    finally:
        drop_draft(draft)
    return True


def read_lease(series_dir: Path) -> Lease | None:
    """Return the lease of a Series; a damaged one is nobody's."""
    try:
        return Lease.model_validate_json((series_dir / "claim.json").read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError:
        return NOBODYS


def release(series_dir: Path, lease: Lease) -> None:
    """Take a lease away that is over; nothing happens where another has come in its place."""
    path = series_dir / "claim.json"
    aside = path.with_name(f".claim.{uuid.uuid4().hex[:8]}")
    try:
        with naming_a_full_disk(path):
            path.rename(aside)
    except FileNotFoundError:
        return
    taken = NOBODYS
    with contextlib.suppress(ValidationError):
        taken = Lease.model_validate_json(aside.read_bytes())
    if taken != lease:  # somebody else dropped it first and leased the Series: give it back
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
    aside.unlink(missing_ok=True)


@dataclass
class Leases:
    """The leases on a ROOT's Series, judged by what schedulers say of the arrays they were made for."""

    root: Root
    ledgers: dict[str, Ledger] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)
    judged: set[str] = field(default_factory=set)
    """Arrays for whose sake a study's Ledger was read again."""
    silence: SchedulerUnavailable | None = None
    """The last answer that failed: the scheduler is not waited for again by each of a thousand Series."""

    def take(self, series_id: str, lease: Lease) -> bool:
        """Lease a Series, in place of a lease that is over; False where somebody else has it."""
        folder = self.root.series(series_id)
        held = read_lease(folder)
        if held is not None:
            if self._holds(held, series_id):
                return False
            release(folder, held)
        return acquire(folder, lease)

    def take_all(self, study_name: str, array: str, tasks: Sequence[Task]) -> list[Task]:
        """Lease the Series of these tasks for an array that is about to be written; returns those that are ours now."""
        lease = Lease(study=study_name, array=array, process=identify_process(), t=time.time())
        taking = side_by_side(
            partial(self.take, lease=lease), [task.series_id for task in tasks], DISK_THREADS
        )
        return [task for task, is_ours in zip(tasks, taking, strict=True) if is_ours]

    def held(self, series_ids: Sequence[str]) -> dict[str, str]:
        """Those of these Series that somebody has leased, and is training or will, and for which study.

        Raises SchedulerUnavailable, saying for whose sake the scheduler is asked.
        """

        def holder(series_id: str) -> str | None:
            lease = read_lease(self.root.series(series_id))
            if lease is None:
                return None
            try:
                return lease.study if self._holds(lease, series_id) else None
            except SchedulerUnavailable as gone:
                arrays = self.root.study(lease.study) / "arrays"
                why = (
                    f"{gone}; a job of study {lease.study} may train series {series_id}: say the same again when "
                    f"{gone.scheduler} answers, or remove {arrays} if there is no such cluster any more"
                )
                raise SchedulerUnavailable(gone.scheduler, why, is_here=gone.is_here) from gone

        holders = side_by_side(holder, series_ids, DISK_THREADS)
        return {
            series_id: study
            for series_id, study in zip(series_ids, holders, strict=True)
            if study is not None
        }

    def _holds(self, lease: Lease, series_id: str) -> bool:
        if not lease.study:
            return False
        if lease.array in (ledger := self._ledger(lease.study)).arrays:
            return ledger.holds(lease.array, series_id)
        if is_in_hand(lease):
            return True
        # Whoever is gone now may have leased, submitted and ended since the Ledger was read.
        return self._ledger_after(lease).holds(lease.array, series_id)

    def _ledger(self, study_name: str) -> Ledger:
        with self.lock:  # Series are leased side by side, and the scheduler is asked once
            if study_name not in self.ledgers:
                self._read(study_name)
            return self.ledgers[study_name]

    def _ledger_after(self, lease: Lease) -> Ledger:
        """The Ledger of a study, read after the submission that made a lease was gone; once for each array."""
        with self.lock:
            if lease.array not in self.judged:
                self._read(lease.study)
                self.judged.add(lease.array)
            return self.ledgers[lease.study]

    def _read(self, study_name: str) -> None:
        if self.silence is not None:
            raise self.silence
        try:
            self.ledgers[study_name] = open_ledger(self.root.study(study_name))
        except SchedulerUnavailable as gone:
            self.silence = gone
            raise


def is_in_hand(lease: Lease) -> bool:
    """Whether a lease without an array may belong to a submission that is about to write it."""
    return not is_given_up(lease.process, lease.t)
