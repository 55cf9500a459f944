"""Submit the parts of a larger work: supervise them here, or hand them to a scheduler and return.

The folder of the work's jobs, `jobs_dir`, holds the records of its arrays, control.jsonl and the jobs' logs, as a
study's directory does. Submitting is idempotent: finished parts are left alone, and so are those of a live job. A part
that failed is tried again whenever the work is submitted again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from harness.common.console import stoppable
from harness.common.disk import make_folder
from harness.common.streams import outlasting_output
from harness.dispatch.arrays import new_name
from harness.dispatch.base import Backend, Handle, SubmitTarget
from harness.dispatch.ledger import open_ledger
from harness.dispatch.part import Part
from harness.dispatch.registry import open_backend
from harness.dispatch.supervise import JobSupervisor
from harness.record.control import Control, attempts_reset_in
from harness.record.jobs import LIVE, JobState, JobView
from harness.record.journal import Event, read_progress
from harness.submit.foreground import closing_in_order
from ssmttm.locks import file_lock


class PartState(StrEnum):
    """State of a part."""

    NEW = "new"
    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    INTERRUPTED = "interrupted"
    """Its process ended before it was done, and no live job has it."""


@dataclass(frozen=True)
class PartStatus:
    """A part and how far it is."""

    part: Part
    state: PartState
    step: int
    """Steps that are done and kept."""
    reason: str | None = None
    """Reason why it failed or was interrupted, or why its job waits."""
    job_id: str = ""


def open_backend_for_parts(target: SubmitTarget, jobs_dir: Path, jobs: int | None = None) -> Backend:
    """Open the backend of a target: with `auto` a job for each part on a cluster, else this machine."""
    name = target.on
    if target.on == "auto":
        name = "local" if target.profile is None else "slurm"
    elif target.on == "ray" and target.profile is None:
        name = "ray-here" if target.ray_address is None else "ray-cluster"
    return open_backend(name, jobs_dir, target, jobs)


def states_of_parts(
    parts: Sequence[Part], jobs_dir: Path, jobs: Mapping[str, JobView] | None = None
) -> list[PartStatus]:
    """Return the state of each part by its journal, and by the views of `jobs` by part."""
    reset = attempts_reset_in(Control(jobs_dir / "control.jsonl").read())
    return [_state_of(part, reset, (jobs or {}).get(part.series_id)) for part in parts]


def _state_of(part: Part, reset: Mapping[str, int], job: JobView | None) -> PartStatus:
    found = read_progress(part.folder)
    is_live = job is not None and job.state in LIVE
    state, reason = PartState.NEW, None
    if found.state == Event.FINISHED:
        state = PartState.DONE
    elif found.state == Event.FAILED and found.attempt > reset.get(part.series_id, 0):
        state, reason = PartState.FAILED, str((found.result or {}).get("reason", "")) or None
    elif found.is_alive or (is_live and job is not None and job.state is JobState.RUNNING):
        state = PartState.RUNNING
    elif is_live and job is not None:
        state, reason = PartState.QUEUED, job.why
    elif found.attempt:
        state, reason = PartState.INTERRUPTED, found.stopped_by
    return PartStatus(part, state, found.step, reason, job.job_id if job is not None else "")


def run_parts(
    parts: Sequence[Part],
    backend: Backend,
    jobs_dir: Path,
    on_progress: Callable[[Sequence[PartStatus]], None] = lambda _: None,
) -> list[PartStatus]:
    """Do parts on a backend of this process; return the state of each when all are done or have failed.

    Raises Stopped after Ctrl-C or SIGTERM and DiskFull, both after all workers have stopped in order.
    """
    make_folder(jobs_dir)
    control = Control(jobs_dir / "control.jsonl")
    _reset(parts, control)
    supervisor = JobSupervisor(control, backend)
    closing = closing_in_order(backend.close, lambda: None, stopping="stopping: workers keep what is done")
    with outlasting_output(), backend, stoppable() as poll_stop, closing:
        while True:
            poll_stop()
            on_progress(states_of_parts(parts, jobs_dir))
            left = [part for part in parts if part.left(control)]
            if not left and supervisor.is_empty:
                return states_of_parts(parts, jobs_dir)
            if wanted := [part for part in left if supervisor.takes(part.series_id)]:
                supervisor.watch_over(backend.submit(wanted))
            supervisor.watch()


class PartsHandedOver(NamedTuple):
    """The result of handing parts over."""

    handles: list[Handle]
    """Those that were submitted now."""
    states: list[PartStatus]
    """The state of every part before that."""
    waiting: int
    """Number of parts that the backend does not admit now."""


def hand_over_parts(parts: Sequence[Part], backend: Backend, jobs_dir: Path) -> PartsHandedOver:
    """Submit the parts that are neither done nor held by a live job to a backend that outlives this process.

    Raises SchedulerUnavailable.
    """
    make_folder(jobs_dir)
    with file_lock(jobs_dir / "submit.lock"):
        states = states_of_parts(parts, jobs_dir, live_jobs(jobs_dir))
        wanted = [
            one.part
            for one in states
            if one.state in {PartState.NEW, PartState.INTERRUPTED, PartState.FAILED}
        ]
        handles: list[Handle] = []
        if wanted:
            _reset(wanted, Control(jobs_dir / "control.jsonl"))
            admitted = backend.count_admitted(len(wanted))
            with backend:
                for members in backend.batches(wanted):
                    if some := members[: admitted - len(handles)]:
                        handles += backend.submit(some, new_name())
    return PartsHandedOver(handles, states, len(wanted) - len(handles))


def live_jobs(jobs_dir: Path) -> dict[str, JobView]:
    """Return the live job of each part that has one, by part; raises SchedulerUnavailable."""
    if not (jobs_dir / "arrays").is_dir():
        return {}
    ledger = open_ledger(jobs_dir)
    found = {}
    for array in ledger.arrays.values():
        for index, task in enumerate(array.tasks):
            if ledger.holds(array.name, task.series_id):
                view = ledger.job_of(array, index) if array.job_id is not None else None
                unseen = JobView(array.job_id or "", array.name, JobState.QUEUED, "SUBMITTING", 0.0, "")
                found[task.series_id] = view or unseen
    return found


def _reset(parts: Sequence[Part], control: Control) -> None:
    """Have the failures of these parts count no longer."""
    attempts = {
        part.series_id: progress.attempt
        for part in parts
        if (progress := read_progress(part.folder)).state == Event.FAILED
    }
    if attempts:
        control.append("retried", runs=list(attempts), attempts=attempts)
