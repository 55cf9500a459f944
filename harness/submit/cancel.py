"""Taking Runs back, and giving up ones another chance: what `cancel` and `retry` do before anything is submitted."""

from __future__ import annotations

import time
from collections.abc import Sequence

from harness.dispatch.base import Backend, Handle
from harness.dispatch.ledger import jobs_of_runs, open_ledger
from harness.record.control import Control
from harness.record.jobs import LIVE
from harness.record.journal import read_progress
from harness.record.registry import ResolvedStudy
from harness.record.root import Root
from harness.record.status import OVER, RunState, RunStatus

SAVING_SECONDS = 60.0
"""How long a job that has been told to end is waited for: SLURM itself ends it 30 s later, unless a site says more."""
LOOK_SECONDS = 2.0
"""Pause between two questions whether it has ended."""


def cancel(root: Root, study_name: str, rows: Sequence[RunStatus]) -> list[RunStatus]:
    """Cancel Runs that are not over: workers skip them and leave at the next step. Returns those it concerns."""
    concerned = [row for row in rows if row.state not in OVER]
    if concerned:
        Control(root.study(study_name) / "control.jsonl").append(
            "cancelled", runs=[row.run_id for row in concerned]
        )
    return concerned


def reset_attempts(root: Root, study_name: str, rows: Sequence[RunStatus]) -> list[RunStatus]:
    """Forget failures and cancellations, so that the next submission trains these Runs. Returns those it concerns."""
    concerned = [row for row in rows if row.state in {RunState.FAILED, RunState.CANCELLED}]
    if concerned:
        Control(root.study(study_name) / "control.jsonl").append(
            "retried",
            runs=[row.run_id for row in concerned],
            attempts={row.run_id: read_progress(root.run(row.run_id)).attempt for row in concerned},
        )
    return concerned


def cancel_jobs_of(resolved: ResolvedStudy, rows: Sequence[RunStatus]) -> dict[str, list[str]]:
    """Cancel the study's jobs of which no Run is wanted any more; returns their ids by the scheduler's name.

    A job some of whose Runs are still wanted goes on: its worker skips what was cancelled.
    """
    folder = resolved.root.study(resolved.study.name)
    if not (folder / "arrays").is_dir():
        return {}
    over = {row.run_id for row in rows if row.state in {RunState.DONE, RunState.FAILED}}
    over |= Control(folder / "control.jsonl").cancelled()
    ledger = open_ledger(folder)
    trained: dict[str, set[str]] = {}
    held_by: dict[str, tuple[Backend, Handle]] = {}
    for array, _, task, view in ledger.elements():
        if view is not None and view.state in LIVE:
            trained.setdefault(view.job_id, set()).update(run_dir.name for run_dir in task.run_dirs)
            held_by[view.job_id] = ledger.backends[array.name], Handle(task, view.job_id, array.name, array.t)
    doomed: dict[Backend, list[Handle]] = {}
    for job_id, runs in trained.items():
        if runs <= over:
            backend, handle = held_by[job_id]
            doomed.setdefault(backend, []).append(handle)
    ended: dict[str, list[str]] = {}
    for backend, handles in doomed.items():
        backend.cancel(handles)
        ended.setdefault(backend.scheduler, []).extend(handle.job_id for handle in handles)
    return ended


def wait_for_ending_jobs(resolved: ResolvedStudy, rows: Sequence[RunStatus]) -> list[str]:
    """Wait for jobs that still save what these Runs were cancelled with; returns the ids of those that still do.

    Until such a job has ended its Series is taken, and it trains nothing more. Raises SchedulerUnavailable.
    """
    folder = resolved.root.study(resolved.study.name)
    cancelled = Control(folder / "control.jsonl").cancelled()
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
