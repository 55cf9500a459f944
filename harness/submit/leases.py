"""Leases on Series, as files created exclusively, so that two submissions never submit the same Series.

A submission that finds a Series leased, or trained by a process, adds its Runs to the work list of the Series
(harness.record.series): the job or process that holds it trains them too.

A lease names the array of jobs for which it was made. It is over when these jobs have ended, or turn out never to have
been submitted. The next submission then removes the file by renaming it, in which only one process can succeed.
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
from typing import Any, NamedTuple

from pydantic import ValidationError

from harness.common.disk import DISK_THREADS, naming_a_full_disk, side_by_side, write_new
from harness.common.process import identify_process
from harness.dispatch.base import Handle, Task
from harness.dispatch.ledger import Ledger, is_given_up, open_ledger
from harness.record.jobs import SchedulerUnavailable
from harness.record.journal import read_progress
from harness.record.root import Root
from harness.record.series import WorkList
from harness.study.run import Frozen
from ssmttm.files import read_document
from ssmttm.locks import is_held


class Lease(Frozen):
    """claim.json of a Series."""

    study: str
    """Name of the study that leases it."""
    array: str
    """Name of the array of jobs for which it was made."""
    process: dict[str, Any]
    """Identity of the process that made it, from process.identify_process."""
    t: float
    """Time at which it was made, seconds since 1970."""


DAMAGED = Lease(study="", array="", process={}, t=0.0)
"""Stands for a damaged lease file; it holds nothing."""


def acquire(series_dir: Path, lease: Lease) -> bool:
    """Lease a Series; return False if it has a lease. Raises DiskFull."""
    return write_new(series_dir / "claim.json", lease.model_dump_json() + "\n")


def read_lease(path: Path) -> Lease | None:
    """Return the lease in a claim.json, DAMAGED if it cannot be read, None if there is none."""
    try:
        return Lease.model_validate_json(read_document(path))
    except FileNotFoundError:
        return None
    except ValidationError:
        return DAMAGED


def release(series_dir: Path, lease: Lease) -> None:
    """Remove a lease that is over, unless another one has taken its place."""
    path = series_dir / "claim.json"
    aside = path.with_name(f".claim.{uuid.uuid4().hex[:8]}")
    try:
        with naming_a_full_disk(path):
            path.rename(aside)
    except FileNotFoundError:
        return
    if read_lease(aside) != lease:
        # Another process released it first, and leased the Series: restore its lease.
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
    aside.unlink(missing_ok=True)


class Trainer(NamedTuple):
    """The job or process that trains a Series, whose work Runs of a submission have joined."""

    study: str
    """Name of the study that submitted the job; empty for a process that no scheduler started."""
    array: str
    job_id: str
    """Empty if the job is still being submitted."""
    runs: tuple[str, ...]
    """Ids of the Runs that joined: not those that the study itself has submitted with the job."""


@dataclass
class Leases:
    """The leases on a ROOT's Series, checked against the ledgers of the studies that made them."""

    root: Root
    ledgers: dict[str, Ledger] = field(default_factory=dict)
    handles: dict[str, dict[str, Handle]] = field(default_factory=dict)
    """By array, the job of each Series."""
    lock: Lock = field(default_factory=Lock)
    reread: set[str] = field(default_factory=set)
    """Arrays for which their study's ledger was read again."""
    silence: SchedulerUnavailable | None = None
    """The error of a scheduler that did not answer; it is not asked again for each of a thousand Series."""

    def take(self, series_id: str, lease: Lease) -> bool:
        """Lease a Series, in place of a lease that is over; return False if its lease is not over."""
        folder = self.root.series(series_id)
        held = read_lease(folder / "claim.json")
        if held is not None:
            if self._holds(held, series_id):
                return False
            release(folder, held)
        return acquire(folder, lease)

    def take_all(self, study_name: str, array: str, tasks: Sequence[Task]) -> list[Task]:
        """Lease the Series of these tasks for an array that is not yet recorded; returns the tasks leased."""
        lease = Lease(study=study_name, array=array, process=identify_process(), t=time.time())
        series_ids = [task.series_id for task in tasks]
        taken = side_by_side(partial(self.take, lease=lease), series_ids, DISK_THREADS)
        return [task for task, is_ours in zip(tasks, taken, strict=True) if is_ours]

    def join(
        self, series_id: str, study_name: str, run_ids: Sequence[str], *, leased_only: bool = False
    ) -> Trainer | None:
        """Add Runs to the work list of the job that leases their Series, or of the process that trains it.

        Return None if there is neither, or if its work has ended or is being cancelled: the Runs are not added then.
        With `leased_only` no process counts. Raises SchedulerUnavailable and DiskFull.
        """
        folder, work = self.root.series(series_id), WorkList(self.root, series_id)
        lease = read_lease(folder / "claim.json")
        if lease is not None and self._holds(lease, series_id):
            handle = self._handle(lease, series_id)
            own = handle.task.run_dirs if handle is not None and lease.study == study_name else ()
            given = {folder.name for folder in own}
            new = tuple(run_id for run_id in run_ids if run_id not in given)
            with work.locked():
                if work.is_closed(lease.array):
                    return None
                work.add(study_name, new, lease.array)
            return Trainer(lease.study, lease.array, handle.job_id if handle is not None else "", new)
        if leased_only or not is_held(folder / "lock") or not read_progress(folder).is_open:
            return None  # a lock without an open journal is that of a process that removes or adds files
        with work.locked():
            if not is_held(folder / "lock"):
                return None
            work.add(study_name, run_ids)
        return Trainer("", "", "", tuple(run_ids))

    def held(self, series_ids: Sequence[str]) -> dict[str, str]:
        """Return those of these Series whose lease is not over, with the name of the study that leases them.

        Raises SchedulerUnavailable, naming the study whose jobs are unknown.
        """

        def holder(series_id: str) -> str | None:
            lease = read_lease(self.root.series(series_id) / "claim.json")
            if lease is None:
                return None
            try:
                return lease.study if self._holds(lease, series_id) else None
            except SchedulerUnavailable as gone:
                arrays = self.root.study(lease.study) / "arrays"
                why = (
                    f"{gone}; a job of study {lease.study} may train series {series_id}: repeat the command when "
                    f"{gone.scheduler} answers, or remove {arrays} if that cluster no longer exists"
                )
                raise SchedulerUnavailable(gone.scheduler, why, is_here=gone.is_here) from gone

        holders = side_by_side(holder, series_ids, DISK_THREADS)
        return {
            series_id: study
            for series_id, study in zip(series_ids, holders, strict=True)
            if study is not None
        }

    def _handle(self, lease: Lease, series_id: str) -> Handle | None:
        """Return the job of a lease; None if its array is still being submitted."""
        array = self._ledger(lease.study).arrays.get(lease.array)
        if array is None:
            return None
        if lease.array not in self.handles:
            self.handles[lease.array] = {handle.task.series_id: handle for handle in array.handles()}
        return self.handles[lease.array].get(series_id)

    def _holds(self, lease: Lease, series_id: str) -> bool:
        if not lease.study or WorkList(self.root, series_id).is_over(lease.array):
            return False
        if lease.array in (ledger := self._ledger(lease.study)).arrays:
            return ledger.holds(lease.array, series_id)
        if not is_given_up(lease.process, lease.t):  # the submission is about to record its array
            return True
        # A submission that has ended by now may have leased, submitted and ended since the ledger was read.
        return self._ledger(lease.study, since=lease.array).holds(lease.array, series_id)

    def _ledger(self, study_name: str, since: str | None = None) -> Ledger:
        """Return the ledger of a study; read it again, once, after the submission of the array `since` has ended."""
        with self.lock:  # threads lease Series in parallel, and the scheduler is asked once
            is_stale = since is not None and since not in self.reread
            if study_name not in self.ledgers or is_stale:
                if self.silence is not None:
                    raise self.silence
                try:
                    self.ledgers[study_name] = open_ledger(self.root.study(study_name))
                except SchedulerUnavailable as gone:
                    self.silence = gone
                    raise
            if since is not None:
                self.reread.add(since)
            return self.ledgers[study_name]
