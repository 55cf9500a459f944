"""Where a study stands, read once or again and again: journals each time, the scheduler seldom.

A journal is a file on our own disk. slurmctld is one process that a whole site talks to, so it is asked at most every
twenty seconds and the less often the longer it took; in between, and while it does not answer, its last word holds.

A plan takes all of that into account: what is done, what is in training, and what is left to train.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness.common.console import warn
from harness.common.format import counted, duration
from harness.dispatch.arrays import Array
from harness.dispatch.base import Dashboard
from harness.dispatch.ledger import Ledger, jobs_of_runs, open_ledger, times_of_jobs
from harness.plan.allocation import describe_shares
from harness.plan.cluster import Cluster, load_profile, this_machine
from harness.plan.plan import Plan, make_plan
from harness.record.control import Control
from harness.record.jobs import LIVE, JobState, JobView, SchedulerUnavailable
from harness.record.registry import ResolvedStudy, open_study
from harness.record.series import unfinished
from harness.record.status import Hours, RunState, RunStatus, StatusReader, count_states
from ssmttm.errors import InputError

SCHEDULER_SECONDS = 20.0
"""Least time between two questions to the scheduler."""
PATIENCE = 20.0
"""How many times as long as an answer took nothing further is asked."""


@dataclass(frozen=True)
class Pilot:
    """A packed array's job that waits or runs."""

    array: Array
    view: JobView
    dashboard: Dashboard | None
    """Page of its Ray, once that has started."""

    def as_json(self) -> dict[str, Any]:
        """A row of `allocations` in `ssmscale status --json`."""
        shape = self.array.shape
        return {
            "job_id": self.view.job_id,
            "state": self.view.state,
            "slurm_state": self.view.slurm_state,
            "reason": self.view.reason,
            "nodes": shape.nodes,
            "gpus": shape.ranks,
            "series": len(self.array.tasks),
            "node_list": self.view.nodes or None,
            "seconds": self.view.seconds,
            "dashboard": self.dashboard.page if self.dashboard else None,
            "tunnel": self.dashboard.tunnel if self.dashboard else None,
            "token_file": str(self.dashboard.token_file) if self.dashboard else None,
        }

    def lines(self) -> Iterable[str]:
        """What a user wants to know of it."""
        view, size = self.view, counted(len(self.array.tasks), "series")
        what = f"job {view.job_id}: {size} packed on {self.array.allocation}"
        if view.state is JobState.QUEUED:
            yield f"{what}, queued: {view.why}"
            return
        yield f"{what}, {view.slurm_state.lower()} for {duration(view.seconds / 3600)} on {view.nodes}"
        if (page := self.dashboard) is not None and page.page is not None:
            yield f"Ray's dashboard: {page.tunnel}, then {page.page} with what is in {page.token_file}"


@dataclass(frozen=True)
class StudySnapshot:
    """A study at one moment."""

    study: str
    rows: Sequence[RunStatus]
    hours: Hours
    notes: tuple[str, ...]
    """What was passed over in journals, a sentence each."""
    problem: str | None = None
    """Why the scheduler's word is old or missing."""
    is_unheard: bool = False
    """Whether the scheduler has been asked and has never answered."""
    pilots: tuple[Pilot, ...] = ()
    """Allocations in which Series of it are packed, that wait or run."""

    @property
    def counts(self) -> Mapping[str, int]:
        """How many Runs are in each state, states that occur alone."""
        return count_states(self.rows)

    @property
    def is_live(self) -> bool:
        """Whether anything is being trained or waits to be, or may be, for all that an unheard scheduler knows."""
        live = {RunState.RUNNING, RunState.QUEUED}
        if self.is_unheard:
            live |= {RunState.NEW, RunState.INTERRUPTED}
        return any(row.state in live for row in self.rows)

    def as_json(self) -> dict[str, Any]:
        """The document of `ssmscale status --json`."""
        rows = [row.as_json() | {"gpu_hours_left": self.hours.left[row.run_id]} for row in self.rows]
        return {
            "study": self.study,
            "runs": rows,
            "counts": self.counts,
            "gpu_hours": self.hours.as_json(),
            "allocations": [pilot.as_json() for pilot in self.pilots],
            "notes": list(self.notes),
        }


class StudyMonitor:
    """Reads one study."""

    def __init__(self, resolved: ResolvedStudy) -> None:
        self.resolved = resolved
        self._journals = StatusReader(resolved.root, resolved.study.name)
        self._folder = resolved.root.study(resolved.study.name)
        self._ledger: Ledger | None = None
        self._problem: str | None = None
        self._next = float("-inf")

    def read(self) -> StudySnapshot:
        """Where it stands now, by the scheduler's newest word."""
        self._ask()
        jobs = {} if self._ledger is None else jobs_of_runs(self._ledger)
        times = {} if self._ledger is None else times_of_jobs(self._ledger)
        rows = self._journals.read(self.resolved.points, jobs=jobs)
        hours = self._journals.hours(rows, times)
        return StudySnapshot(
            self.resolved.study.name,
            rows,
            hours,
            self._journals.notes,
            self._problem,
            is_unheard=self._problem is not None and (self._ledger is None or bool(self._ledger.unheard)),
            pilots=() if self._ledger is None else pilots_of(self._ledger),
        )

    def _ask(self) -> None:
        begun = time.monotonic()
        if begun < self._next or not (self._folder / "arrays").is_dir():
            return
        try:
            self._ledger = open_ledger(self._folder)
            said = self._ledger.problem
            self._problem = f"{said}; the journals tell what is known" if said else None
        except SchedulerUnavailable as gone:
            known = "the journals tell what is known" if self._ledger is None else "its last word holds"
            self._problem = f"{gone.scheduler}: {gone}; {known}"
        now = time.monotonic()
        self._next = now + max(SCHEDULER_SECONDS, PATIENCE * (now - begun))


def pilots_of(ledger: Ledger) -> tuple[Pilot, ...]:
    """The packed arrays of a study whose jobs wait or run, oldest first."""
    found = []
    for array in ledger.arrays.values():
        view = ledger.job_of(array, 0) if array.packed else None
        if view is not None and view.state in LIVE:
            is_running = view.state is JobState.RUNNING
            dashboard = ledger.backends[array.name].dashboard(array.name) if is_running else None
            found.append(Pilot(array, view, dashboard))
    return tuple(found)


def rows_of(resolved: ResolvedStudy) -> list[RunStatus]:
    """Where every Run of a study stands now."""
    return StatusReader(resolved.root, resolved.study.name).read(resolved.points, jobs=jobs_of(resolved))


def jobs_of(resolved: ResolvedStudy) -> dict[str, JobView]:
    """What the schedulers say of the study's jobs, by run id; nothing, and a warning, where they do not answer."""
    folder = resolved.root.study(resolved.study.name)
    if not (folder / "arrays").is_dir():
        return {}
    try:
        ledger = open_ledger(folder)
    except SchedulerUnavailable as gone:
        warn(f"{gone}; the journals tell what is known")
        return {}
    if ledger.problem:
        warn(f"{ledger.problem}; the journals tell what is known")
    _warn_of_elsewhere(ledger, folder)
    return jobs_of_runs(ledger)


def _warn_of_elsewhere(ledger: Ledger, folder: Path) -> None:
    """Name the arrays of other clusters that have something left to train: nothing is known of them here."""
    for name, cluster in ledger.elsewhere.items():
        array = ledger.arrays[name]
        left = unfinished(
            [run for task in array.tasks for run in task.run_dirs], Control(folder / "control.jsonl")
        )
        if left:
            what = f"job {array.job_id}" if array.job_id else f"a submission of {name}"
            warn(
                f"{counted(len(left), 'run')} left to {what} of SLURM cluster {cluster}, which is not asked "
                f"from here: see to it there; if there is no such cluster any more, remove {folder}/arrays/{name}.json"
            )


def begun(resolved: ResolvedStudy) -> list[RunStatus]:
    """The study's rows; raises InputError where nothing of it was ever trained here."""
    rows = rows_of(resolved)
    if all(row.state in {RunState.NEW, RunState.CANCELLED} for row in rows):
        name = resolved.study.name
        raise InputError(
            f"study {name}: nothing of it has been trained under {resolved.root.path}; submit it first"
        )
    return rows


def choose(rows: list[RunStatus], wanted: Sequence[str] | None) -> list[RunStatus]:
    """The rows whose ids begin with what is wanted, all where nothing is; raises InputError unless each means one."""
    if not wanted:
        return rows
    chosen = []
    for name in wanted:
        found = [row for row in rows if row.run_id.startswith(name)]
        if len(found) != 1:
            raise InputError(
                f"{name}: begins the id of {len(found)} runs of this study; see `ssmscale status`"
            )
        chosen += found
    return chosen


def planned(
    study: str, root: Path | None, changes: Sequence[str] | None, cluster: str | None
) -> tuple[ResolvedStudy, Plan]:
    """A study and what is left to train of it, here or on a cluster; trains nothing and fetches nothing."""
    resolved = open_study(study, root, changes, fetch=False)
    made = plan_of(resolved, cluster)
    if cluster and (shares := describe_shares(made.missing, load_profile(cluster), "auto")):
        note = ("packing", f"--on auto trains {'; '.join(shares)}")
        made = replace(made, notes=(*made.notes, note))
    return resolved, made


def plan_of(resolved: ResolvedStudy, cluster: str | None) -> Plan:
    """What is left to train of a study, here or on a cluster."""
    return plan_for(resolved, load_profile(cluster).cluster() if cluster else this_machine())


def plan_for(resolved: ResolvedStudy, cluster: Cluster, jobs: Mapping[str, JobView] | None = None) -> Plan:
    """Return the plan of a study for a machine or a cluster; `jobs` where they were asked for."""
    known = jobs_of(resolved) if jobs is None else jobs
    try:
        return make_plan(resolved.study, resolved.points, resolved.corpus, resolved.root, cluster, known)
    except InputError as error:
        raise InputError(f"{resolved.where}: {error}") from error
