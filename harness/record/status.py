"""State of every Run of a study, and its GPU-hours, from the journals and control.jsonl alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from harness.common.process import process_is_alive
from harness.record.control import attempts_reset_in, cancelled_in
from harness.record.heartbeat import describe_pause
from harness.record.hours import Hours, JobTime, count_hours
from harness.record.jobs import ELSEWHERE, JobState, JobView
from harness.record.journal import Event, Progress, ProgressReader
from harness.record.nodes import BadNode, bad_nodes_in
from harness.record.root import Root, read_launch
from harness.record.series import WorkList
from harness.study.grid import GridPoint
from harness.study.run import Run, branch_step
from ssmttm.errors import InputError
from ssmttm.locks import is_held


class RunState(StrEnum):
    """The state of a Run."""

    NEW = "new"
    QUEUED = "queued"
    RUNNING = "running"
    INTERRUPTED = "interrupted"
    """It began, and no process trains it; the next submission continues from its last checkpoint."""
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


OVER = frozenset({RunState.DONE, RunState.FAILED, RunState.CANCELLED})
"""States that a Run leaves only by a command."""


@dataclass(frozen=True)
class RunStatus:
    """One row of the status table."""

    point: GridPoint
    run_id: str
    series_id: str
    state: RunState
    iterations_done: int
    loss: float | None
    """Held-out loss of a finished Run in nats a token."""
    train_loss: float | None
    """Newest training loss, with label smoothing."""
    tokens_per_second: float | None
    job_id: str | None
    reason: str | None
    """Reason why the Run failed, was interrupted or waits."""
    slurm_state: str | None = None
    """SLURM's state of its newest job."""
    result: Mapping[str, Any] | None = None
    """The `finished` event of its journal."""
    is_others: bool = False
    """True if another study trains its Series, and this one has not asked for it by a job or a live submission."""
    still_seconds: float | None = None
    """Time for which none of its ranks has moved, if that is longer than usual."""
    layout_changes: tuple[str, ...] = ()
    """Changes of layout while it was trained: its loss agrees with an undisturbed one to rounding alone."""

    def as_json(self) -> dict[str, Any]:
        """Return its row of `ssmscale status --json`."""
        return {
            "run_id": self.run_id,
            "series": self.series_id,
            "architecture": self.point.architecture,
            "size": self.point.size,
            "seed": self.point.run.seed,
            "state": self.state,
            "iterations": self.point.run.iterations,
            "iterations_done": self.iterations_done,
            "loss": self.loss,
            "train_loss": self.train_loss,
            "tokens_per_second": self.tokens_per_second,
            "job_id": self.job_id,
            "reason": self.reason,
            "slurm_state": self.slurm_state,
            "layout_changes": list(self.layout_changes),
        }


class StatusReader:
    """Reads the states of a study's Runs repeatedly, each time only what was appended to their journals."""

    def __init__(self, root: Root, study_name: str) -> None:
        self.root = root
        self.notes: tuple[str, ...] = ()
        """A sentence for each line of a journal that the newest reading skipped."""
        self.bad_nodes: tuple[BadNode, ...] = ()
        """Nodes that the study avoids."""
        self._journals = ProgressReader(newest_only=True)
        self._trunks: dict[str, Progress] = {}
        self._runs: dict[str, Progress] = {}
        self.name, self.control = study_name, root.control(study_name)

    def read(
        self,
        points: Iterable[GridPoint],
        *,
        submitter: Mapping[str, Any] | None = None,
        jobs: Mapping[str, JobView] | None = None,
    ) -> list[RunStatus]:
        """Return the status of each Run, in the order given; Runs that `submitter` itself submitted are not queued.

        `jobs` are a scheduler's jobs by run id, without which waiting jobs and other machines' processes are unknown.
        """
        events = self.control.read()
        cancelled, reset = cancelled_in(events), attempts_reset_in(events)
        waiting, asked = _waiting(events, submitter), _waiting(events, None)
        self.bad_nodes = tuple(bad_nodes_in(events).values())
        trunks: dict[str, Progress] = {}
        runs: dict[str, Progress] = {}
        found = []
        notes: list[str] = []
        for point in points:
            run_id, series_id = point.run_id, point.series_id
            if series_id not in trunks:
                trunks[series_id] = self._journals.read(self.root.series(series_id))
                notes += trunks[series_id].damaged
            trunk = trunks[series_id]
            own = runs[run_id] = self._journals.read(self.root.run(run_id))
            notes += own.damaged
            job = (jobs or {}).get(run_id)
            state = _state(point.run, own, trunk, reset.get(run_id, 0))
            if state is RunState.INTERRUPTED and self._is_trained_elsewhere(series_id, own, trunk):
                state = RunState.RUNNING
            state = _by_scheduler(point.run, state, job, own, trunk)
            if run_id in cancelled and state not in {RunState.DONE, RunState.FAILED} and not own.is_alive:
                state = RunState.CANCELLED
            elif state in {RunState.NEW, RunState.INTERRUPTED} and run_id in waiting:
                state = RunState.QUEUED
            is_others = state is RunState.RUNNING and job is None and run_id not in asked
            is_others = is_others and self._is_launched_by_another(series_id)
            row = _row(point, state, own, trunk, job, is_others=is_others)
            found.append(_with_pause(row, self.root, job) if state is RunState.RUNNING else row)
        self.notes, self._trunks, self._runs = tuple(notes), trunks, runs
        return found

    def _is_trained_elsewhere(self, series_id: str, *journals: Progress) -> bool:
        """True if a process of another host holds the lock of a Series whose journals are open."""
        if not any(journal.is_of_another_host for journal in journals):
            return False
        try:
            return is_held(self.root.series(series_id) / "lock")
        except OSError:  # of a reader who may not open it
            return False

    def _is_launched_by_another(self, series_id: str) -> bool:
        """True if the launch settings of a Series are those of another study's submission."""
        try:
            return read_launch(self.root, series_id).control != self.control.path.absolute()
        except InputError:
            return True

    def hours(self, rows: Sequence[RunStatus], jobs: Mapping[str, JobTime]) -> Hours:
        """Return the GPU-hours as of the newest reading, whose rows these are; `jobs` as for `count_hours`."""
        points = [row.point for row in rows]
        wanted = [row.run_id for row in rows if row.state not in OVER]
        counted = count_hours(points, self._trunks, self._runs, wanted, jobs)
        return replace(counted, shared=frozenset(filter(self._is_shared, counted.used)))

    def _is_shared(self, series_id: str) -> bool:
        """True if another study has asked for Runs of a Series, or trains it for this one."""
        asked = {request.study for request in WorkList(self.root, series_id).requests(ended=True)}
        return bool(asked) and (asked != {self.name} or self._is_launched_by_another(series_id))


def count_states(rows: Sequence[RunStatus]) -> dict[str, int]:
    """Count the Runs in each state that occurs."""
    return dict(Counter(row.state for row in rows))


def to_rounding(rows: Sequence[RunStatus]) -> str:
    """Return a sentence on the Runs whose layout changed while they were trained; empty if there are none."""
    changed = [row for row in rows if row.layout_changes]
    if not changed:
        return ""
    texts = list(dict.fromkeys(text for row in changed for text in row.layout_changes))
    return (
        f"{len(changed)} of the study's {len(rows)} runs went on with another layout, so their losses agree with an "
        f"undisturbed training to rounding, not to the bit: {', '.join(texts[:3])}."
    )


def _waiting(events: Iterable[Mapping[str, Any]], submitter: Mapping[str, Any] | None) -> set[str]:
    """Return the ids of Runs whose submission, by another process than `submitter`, still runs."""
    waiting: set[str] = set()
    for event in events:
        process = event.get("process", {})
        if event["event"] == "submitted" and process != submitter and process_is_alive(process):
            waiting |= set(event.get("runs", ()))
    return waiting


def _state(run: Run, own: Progress, trunk: Progress, reset: int) -> RunState:
    if own.state == Event.FINISHED:
        return RunState.DONE
    if own.state == Event.FAILED and own.attempt > reset:
        return RunState.FAILED
    if own.is_alive or trunk.is_alive:
        return RunState.RUNNING
    if own.attempt > reset or (0 < trunk.step < run.iterations and trunk.state != Event.FINISHED):
        return RunState.INTERRUPTED
    return RunState.NEW


def _by_scheduler(run: Run, state: RunState, job: JobView | None, own: Progress, trunk: Progress) -> RunState:
    """Return the state by the journals, corrected by that of a live job."""
    if job is None or state not in {RunState.NEW, RunState.INTERRUPTED, RunState.RUNNING}:
        return state
    if job.state is JobState.QUEUED:
        return RunState.QUEUED
    if job.state is JobState.RUNNING and job.study:  # it trains other Runs of the Series first
        is_on_trunk = trunk.is_trained_by(job.job_id) and trunk.step < branch_step(
            run.schedule, run.iterations
        )
        return RunState.RUNNING if is_on_trunk or own.is_trained_by(job.job_id) else RunState.QUEUED
    if job.state is JobState.RUNNING:
        has_begun = not job.packed or any(held.is_trained_by(job.job_id) for held in (own, trunk))
        return RunState.RUNNING if has_begun or state is RunState.RUNNING else RunState.QUEUED
    return state


def _row(
    point: GridPoint, state: RunState, own: Progress, trunk: Progress, job: JobView | None, *, is_others: bool
) -> RunStatus:
    result = own.result if state is RunState.DONE else None
    branch = branch_step(point.run.schedule, point.run.iterations)
    latest = own if own.step else trunk
    last = max(latest.steps, default=0)
    is_ours = latest is own or last <= branch  # beyond its branch step the trunk is that of longer Runs
    newest = latest.steps.get(last, {}) if is_ours and state is not RunState.NEW else {}
    done = point.run.iterations if result else max(own.step, min(trunk.step, branch))
    reason = own.result.get("reason") if state is RunState.FAILED and own.result else None
    if state is RunState.INTERRUPTED:
        reason = (own if own.attempt else trunk).stopped_by
    if job is not None and state in {RunState.QUEUED, RunState.RUNNING}:
        reason = _why(job)
        if job.study:
            reason = f"job {job.job_id} of study {job.study} trains its trunk"
            reason += f", and waits: {why}" if (why := _why(job)) else ""
        elif job.packed and job.state is JobState.RUNNING and state is RunState.QUEUED:
            reason = f"waits for its turn in job {job.job_id}"
    elif job is not None and state in {RunState.NEW, RunState.INTERRUPTED}:
        over = f"job {job.job_id} is over: {job.slurm_state}"  # the journals may not know it
        reason = f"{reason}; {over}" if reason else over
    # The trunk may go on for longer Runs after this one has left it.
    before = [change for change in trunk.changes if change.step < branch]
    changes = dict.fromkeys(change.text for change in (*before, *own.changes))
    return RunStatus(
        point=point,
        run_id=point.run_id,
        series_id=point.series_id,
        state=state,
        iterations_done=0 if state is RunState.NEW else done,
        loss=result.get("loss") if result else None,
        train_loss=newest.get("loss"),
        tokens_per_second=newest.get("tokens_per_second"),
        job_id=(job.job_id if job else None) or (own.started or trunk.started or {}).get("job_id"),
        reason=reason,
        result=result,
        layout_changes=tuple(changes) if state is not RunState.NEW else (),
        slurm_state=job.slurm_state if job else None,
        is_others=is_others,
    )


def _with_pause(row: RunStatus, root: Root, job: JobView | None) -> RunStatus:
    """Return the row of a running Run; if nothing moves, it says for how long and gives no speed."""
    job_seconds = math.inf if job is None or job.packed else job.seconds
    found = describe_pause(root.series(row.series_id), job_seconds)
    if found is None:
        return row
    return replace(row, still_seconds=found[0], reason=row.reason or found[1], tokens_per_second=None)


def _why(job: JobView) -> str | None:
    """Return why a job waits, or why it does not run although it has its nodes; None for one that runs."""
    if job.state is JobState.RUNNING:
        return None if job.slurm_state == "RUNNING" else job.slurm_state
    if job.slurm_state in {"PENDING", "SUBMITTING", ELSEWHERE}:
        return job.why
    return f"{job.slurm_state}: {job.why}"
