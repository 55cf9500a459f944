"""Cancel Runs and their jobs, and reset the attempts of failed Runs: the first part of `cancel` and of `retry`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

from harness.dispatch.base import Backend, Handle, close_work
from harness.dispatch.ledger import jobs_of_runs, open_ledger
from harness.record.jobs import LIVE
from harness.record.journal import read_progress
from harness.record.registry import ResolvedStudy
from harness.record.root import Root
from harness.record.series import WorkList
from harness.record.status import OVER, RunState, RunStatus
from harness.study.run import by_series

SAVING_SECONDS = 60.0
"""Time to wait for a cancelled job to end; SLURM's default is to kill it after 30 s."""
LOOK_SECONDS = 2.0
"""Pause between two calls that ask whether it has ended."""


def cancel(root: Root, study_name: str, rows: Sequence[RunStatus]) -> list[RunStatus]:
    """Cancel the Runs that are not over, and return them; their workers leave them at the next step."""
    cancelled = [row for row in rows if row.state not in OVER]
    if cancelled:
        root.control(study_name).append("cancelled", runs=[row.run_id for row in cancelled])
    return cancelled


def reset_attempts(root: Root, study_name: str, rows: Sequence[RunStatus]) -> list[RunStatus]:
    """Reset the failed and cancelled Runs, and return them; the next submission trains them."""
    reset = [row for row in rows if row.state in {RunState.FAILED, RunState.CANCELLED}]
    if reset:
        root.control(study_name).append(
            "retried",
            runs=[row.run_id for row in reset],
            attempts={row.run_id: read_progress(root.run(row.run_id)).attempt for row in reset},
        )
    return reset


class CancelledJobs(NamedTuple):
    """The jobs whose Runs are all over or cancelled."""

    ended: dict[str, list[str]]
    """Ids of the jobs that were cancelled, by the scheduler's name."""
    kept: list[str]
    """Ids of the jobs that continue for Runs of other studies, which have joined them."""


def cancel_jobs_of(resolved: ResolvedStudy, rows: Sequence[RunStatus]) -> CancelledJobs:
    """Cancel the study's jobs whose Runs are all over or cancelled, unless Runs of other studies have joined them.

    Other jobs continue: their workers skip cancelled Runs.
    """
    folder = resolved.root.study(resolved.study.name)
    if not (folder / "arrays").is_dir():
        return CancelledJobs({}, [])
    over = {row.run_id for row in rows if row.state in {RunState.DONE, RunState.FAILED}}
    over |= resolved.root.control(resolved.study.name).cancelled()
    ledger = open_ledger(folder)
    tasks_of: dict[tuple[Backend, str], list[Handle]] = {}
    for array, handle, view in ledger.elements():
        if view is not None and view.state in LIVE:
            tasks_of.setdefault((ledger.backends[array.name], handle.job_id), []).append(handle)
    doomed: dict[Backend, list[Handle]] = {}
    kept: list[str] = []
    for (backend, _), handles in tasks_of.items():
        tasks = [handle.task for handle in handles]
        if not over.issuperset(run_dir.name for task in tasks for run_dir in task.run_dirs):
            continue
        if close_work(handles[0].batch, tasks, is_over=False):
            doomed.setdefault(backend, []).append(handles[0])
        else:
            kept.append(handles[0].job_id)
    ended: dict[str, list[str]] = {}
    for backend, handles in doomed.items():
        backend.cancel(handles)
        ended.setdefault(backend.scheduler, []).extend(handle.job_id for handle in handles)
    return CancelledJobs(ended, kept)


def wanted_by_others(resolved: ResolvedStudy, rows: Sequence[RunStatus]) -> dict[str, list[str]]:
    """Return the studies for which Runs stay in the work of a job or process, by the ids of these Runs."""
    found: dict[str, list[str]] = {}
    for series_id, members in by_series([row.point for row in rows]).items():
        work = WorkList(resolved.root, series_id)
        left = {folder.name for folder in work.joined()} & {point.run_id for point in members}
        for request in work.requests():
            if request.run_id in left and request.study != resolved.study.name:
                found.setdefault(request.run_id, []).append(request.study)
    return found


def wait_for_ending_jobs(resolved: ResolvedStudy, rows: Sequence[RunStatus]) -> list[str]:
    """Wait for cancelled jobs of these Runs that are still saving; returns the ids of those that have not ended.

    Such a job holds its Series until it has ended, and trains no other Run. Raises SchedulerUnavailable.
    """
    folder = resolved.root.study(resolved.study.name)
    cancelled = resolved.root.control(resolved.study.name).cancelled()
    given_up = {row.run_id for row in rows if row.state is RunState.FAILED or row.run_id in cancelled}
    deadline = time.monotonic() + SAVING_SECONDS
    while True:
        jobs = jobs_of_runs(open_ledger(folder)) if given_up else {}
        ending = {
            view.job_id for run, view in jobs.items() if run in given_up and view.slurm_state == "COMPLETING"
        }
        if not ending or time.monotonic() >= deadline:
            return sorted(ending)
        time.sleep(LOOK_SECONDS)
