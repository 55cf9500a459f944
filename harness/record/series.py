"""A Series under ROOT: the lock of the one process that trains it, its work list, and what decides on another start.

A scheduler may restart a job while its old process still holds the lock on a node believed dead. The new start ignores
that lock, and its journals fence off the old process.

A Run of another study that needs the same trunk joins the work list of the Series, joined.jsonl, and the job or process
that trains the Series trains it too. The list has a lock of its own. Under it a submission adds Runs, after a look that
the trainer has not ended, and under it the trainer ends, after a last look that none is left: so no Run is lost.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from filelock import BaseFileLock, Timeout
from pydantic import ValidationError

from harness.common.disk import append_line, appending, naming_a_full_disk, write_atomically
from harness.common.jsonl import read_lines
from harness.record import checkpoints
from harness.record.control import Control, attempts_reset_in, cancelled_in
from harness.record.journal import Event, Journal, read_progress
from harness.record.kinds import Kind
from harness.record.root import Root, read_run
from harness.study.run import Frozen, WholeNumber
from ssmttm.errors import InputError
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


def study_of(root: Root, control: Path) -> str | None:
    """Return the name of the study of a control.jsonl; None if it is not in ROOT."""
    with contextlib.suppress(ValueError):
        return str(control.absolute().parent.relative_to((root.path / "studies").absolute()))
    return None


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


class JoinRequest(NamedTuple):
    """A Run in the work list of a Series, and the study that asks for it."""

    run_id: str
    study: str
    array: str
    """Array whose job it joined; empty for a process that no scheduler started."""


RUN_ID = re.compile(r"[0-9a-f]{12}")
STUDY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}(/tune)?")
"""Name of a study, or of the trials of its search."""


class WorkList:
    """joined.jsonl of a Series: Runs that joined the work of its trainer, and the ends of trainers' work."""

    def __init__(
        self, root: Root, series_id: str, given: Iterable[str] = (), control: Control | None = None
    ) -> None:
        """Open the list; `given` are the ids of the Runs that its trainer was given, by the study of `control`."""
        self.root, self.series_id, self.given, self.control = root, series_id, tuple(given), control
        self.path = root.series(series_id) / "joined.jsonl"
        self._controls: list[Control] = []
        """Those of the studies that asked for Runs when the list was last read."""

    def locked(self) -> BaseFileLock:
        """Return the lock under which Runs join, and a trainer has its last look."""
        return file_lock(Path(f"{self.path}.lock"))

    def requests(self, *, ended: bool = False) -> list[JoinRequest]:
        """Return the Runs that joined, over or not; without `ended` not those whose trainer's work has ended."""
        found: dict[JoinRequest, None] = {}
        for line in read_lines(self.path):
            study, array = line.get("study"), line.get("array")
            if line["event"] == "closed" and not ended:
                found = {request: None for request in found if request.array != array}
            elif isinstance(study, str) and isinstance(array, str) and STUDY.fullmatch(study):
                runs = (run_id for run_id in line.get("runs", ()) if RUN_ID.fullmatch(run_id))
                found |= dict.fromkeys(JoinRequest(run_id, study, array) for run_id in runs)
        return [request for request in found if self._is_ours(request.run_id)]

    def add(self, study: str, run_ids: Sequence[str], array: str = "") -> None:
        """Add Runs that a study asks for, each once; the caller holds the lock. Raises DiskFull."""
        known = set(self.requests())
        if new := [run_id for run_id in run_ids if JoinRequest(run_id, study, array) not in known]:
            self._append("joined", runs=new, study=study, array=array)

    def close(self, array: str, *, by_force: bool = False, is_over: bool = True) -> bool:
        """End the work of an array on the Series: no Run joins it any more. Raises DiskFull.

        Return False, and change nothing, if Runs that joined are left, unless `by_force`. The lease on the Series ends
        too, unless the work is not over yet, as that of a job that is being cancelled.
        """
        with self.locked():
            if not by_force and self.joined():
                return False
            if not (self.is_over(array) if is_over else self.is_closed(array)):
                self._append("closed", array=array, is_over=is_over)
        return True

    def is_closed(self, array: str) -> bool:
        """True if no Run may join the work of an array any more."""
        return any(self._ends(array))

    def is_over(self, array: str) -> bool:
        """True if the work of an array on the Series is over, although its scheduler may still have the job."""
        return any(line.get("is_over") is True for line in self._ends(array))

    def joined(self) -> list[Path]:
        """Return the directories of the Runs that joined and are neither over nor cancelled."""
        asked = self._asked().items()
        left = [unfinished(map(self.root.run, runs), self.root.control(study)) for study, runs in asked]
        return list(dict.fromkeys(chain.from_iterable(left)))

    def left(self) -> list[Path]:
        """Return the directories of the Runs, given or joined, that are neither over nor cancelled."""
        given = map(self.root.run, self.given)
        own = unfinished(given, self.control) if self.control is not None else []
        return list(dict.fromkeys([*own, *self.joined()]))

    def run_dirs(self) -> list[Path]:
        """Return the directories of all Runs, given or joined."""
        ids = dict.fromkeys([*self.given, *(request.run_id for request in self.requests())])
        return [self.root.run(run_id) for run_id in ids]

    def cancelled(self) -> set[str]:
        """Return the ids of the Runs that all studies which asked for them have cancelled."""
        asked = self._asked()
        self._controls = [self.root.control(study) for study in asked]
        groups = list(zip(self._controls, map(set, asked.values()), strict=True))
        if self.control is not None:
            groups.append((self.control, set(self.given)))
        dropped, wanted = set[str](), set[str]()
        for control, runs in groups:
            cancelled = control.cancelled()
            dropped |= runs & cancelled
            wanted |= runs - cancelled
        return dropped - wanted

    def state(self) -> tuple[int, ...]:
        """Return the sizes of the files that decided on `cancelled` when it was last called."""
        own = [] if self.control is None else [self.control]
        return tuple(map(_size, [self.path, *(control.path for control in (*own, *self._controls))]))

    def _asked(self) -> dict[str, list[str]]:
        """Return the Runs that joined, by study."""
        found: dict[str, list[str]] = {}
        for request in self.requests():
            found.setdefault(request.study, []).append(request.run_id)
        return found

    def _ends(self, array: str) -> Iterator[dict[str, Any]]:
        lines = read_lines(self.path)
        return (line for line in lines if line["event"] == "closed" and line.get("array") == array)

    def _is_ours(self, run_id: str) -> bool:
        """True if a Run exists and is one of this Series: others may write the list."""
        try:
            return read_run(self.root.run(run_id)).series_id == self.series_id
        except InputError:
            return False

    def _append(self, event: str, **fields: Any) -> None:
        line = json.dumps({"t": round(time.time(), 3), "event": event, **fields}).encode() + b"\n"
        with naming_a_full_disk(self.path), appending(self.path) as descriptor:
            append_line(descriptor, line, self.path, durable=True)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


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
