"""Read the state of a study, once or repeatedly, and plan the Runs that are left.

Journals, which are local files, are read each time. slurmctld is one process that serves a whole site: it is asked at
most every twenty seconds, and less often if it answers slowly. In between, and while it does not answer, its last
answer is used.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness.common.console import warn
from harness.common.format import counted, duration
from harness.dispatch.arrays import Array
from harness.dispatch.base import Dashboard
from harness.dispatch.ledger import Ledger, jobs_of_runs, open_with_joined, times_of_jobs
from harness.plan.allocation import describe_shares
from harness.plan.cluster import Cluster, load_profile, this_machine
from harness.plan.plan import Plan, make_plan
from harness.record.control import Control, joined_in
from harness.record.hours import Hours
from harness.record.jobs import LIVE, JobState, JobView, SchedulerUnavailable
from harness.record.nodes import BadNode
from harness.record.registry import ResolvedStudy, open_study
from harness.record.root import Root
from harness.record.series import unfinished
from harness.record.status import RunState, RunStatus, StatusReader, count_states
from harness.submit.target import Options, last_options
from ssmttm.errors import InputError

SCHEDULER_SECONDS = 20.0
"""Shortest interval between two calls to the scheduler."""
PATIENCE = 20.0
"""Pause after a call to the scheduler, as a multiple of the time it took."""
FROM_JOURNALS = "only the journals are shown"


@dataclass(frozen=True)
class PackedJob:
    """The job of a packed array that waits or runs."""

    array: Array
    view: JobView
    dashboard: Dashboard | None
    """Dashboard of its Ray; None until Ray has started."""

    def as_json(self) -> dict[str, Any]:
        """Return an entry of `allocations` in `ssmscale status --json`."""
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
        """Describe it in one or two lines of `ssmscale status`."""
        view, size = self.view, counted(len(self.array.tasks), "series")
        what = f"job {view.job_id}: {size} packed on {self.array.allocation}"
        if view.state is JobState.QUEUED:
            yield f"{what}, queued: {view.why}"
            return
        yield f"{what}, {view.slurm_state.lower()} for {duration(view.seconds / 3600)} on {view.nodes}"
        if (page := self.dashboard) is not None and page.page is not None:
            yield f"Ray's dashboard: {page.tunnel}, then {page.page} with the token in {page.token_file}"


@dataclass(frozen=True)
class StudySnapshot:
    """The state of a study at one moment."""

    study: str
    rows: Sequence[RunStatus]
    hours: Hours
    notes: tuple[str, ...]
    """A sentence for each damaged part of a journal that was skipped."""
    problem: str | None = None
    """Reason why the scheduler's answer is old or missing."""
    is_unheard: bool = False
    """True if the scheduler was asked and has never answered."""
    packed_jobs: tuple[PackedJob, ...] = ()
    """Packed jobs of the study that wait or run."""
    bad_nodes: tuple[BadNode, ...] = ()
    """Nodes that failed under its Runs, which it avoids."""
    root: Path = Path("runs")
    options: tuple[str, ...] = ()
    """Options of its last submission, as they are typed."""

    @property
    def counts(self) -> Mapping[str, int]:
        """Number of Runs in each state that occurs."""
        return count_states(self.rows)

    @property
    def is_live(self) -> bool:
        """True if any Run trains or is queued, or might be as far as an unheard scheduler is concerned."""
        live = {RunState.RUNNING, RunState.QUEUED}
        if self.is_unheard:
            live |= {RunState.NEW, RunState.INTERRUPTED}
        return any(row.state in live for row in self.rows)

    def as_json(self) -> dict[str, Any]:
        """Return the document of `ssmscale status --json`."""
        rows = [row.as_json() | {"gpu_hours_left": self.hours.left[row.run_id]} for row in self.rows]
        return {
            "study": self.study,
            "runs": rows,
            "counts": self.counts,
            "gpu_hours": self.hours.as_json(),
            "allocations": [job.as_json() for job in self.packed_jobs],
            "notes": list(self.notes),
        }


class StudyMonitor:
    """Reads the state of one study repeatedly."""

    def __init__(self, resolved: ResolvedStudy) -> None:
        self.resolved = resolved
        self._journals = StatusReader(resolved.root, resolved.study.name)
        self._ledger: Ledger | None = None
        self._problem: str | None = None
        self._next = float("-inf")

    def read(self) -> StudySnapshot:
        """Return its state by the journals and the scheduler's newest answer."""
        self._ask()
        ledger = self._ledger or Ledger({}, {}, {})
        rows = self._journals.read(self.resolved.points, jobs=jobs_of_runs(ledger))
        return StudySnapshot(
            self.resolved.study.name,
            rows,
            self._journals.hours(rows, times_of_jobs(ledger)),
            self._journals.notes,
            self._problem,
            is_unheard=self._problem is not None and (self._ledger is None or bool(ledger.unheard)),
            packed_jobs=packed_jobs_of(ledger),
            root=self.resolved.root.path,
            options=self._options(),
            bad_nodes=self._journals.bad_nodes,
        )

    def _options(self) -> tuple[str, ...]:
        """Return the options of the last submission, as they are typed; none if others may have written them."""
        with contextlib.suppress(InputError):
            if last := last_options(self.resolved, Options()):
                return last.words()
        return ()

    def _ask(self) -> None:
        begun = time.monotonic()
        root, name = self.resolved.root, self.resolved.study.name
        if begun < self._next or not has_jobs(root, name):
            return
        try:
            self._ledger = open_with_joined(root, name)
            problem = self._ledger.problem
            self._problem = f"{problem}; {FROM_JOURNALS}" if problem else None
        except SchedulerUnavailable as gone:
            shown = FROM_JOURNALS if self._ledger is None else "its last answer is shown"
            self._problem = f"{gone.scheduler}: {gone}; {shown}"
        now = time.monotonic()
        self._next = now + max(SCHEDULER_SECONDS, PATIENCE * (now - begun))


def packed_jobs_of(ledger: Ledger) -> tuple[PackedJob, ...]:
    """Return the packed jobs of a study that wait or run, oldest first."""
    found = []
    for array in ledger.arrays.values():
        view = ledger.job_of(array, 0) if array.packed else None
        if view is not None and view.state in LIVE:
            is_running = view.state is JobState.RUNNING
            dashboard = ledger.backends[array.name].dashboard(array.name) if is_running else None
            found.append(PackedJob(array, view, dashboard))
    return tuple(found)


def has_jobs(root: Root, study_name: str) -> bool:
    """True if a study has submitted jobs, or Runs of it have joined those of others."""
    return (root.study(study_name) / "arrays").is_dir() or bool(joined_in(root.control(study_name).read()))


def rows_of(resolved: ResolvedStudy) -> list[RunStatus]:
    """Return the state of every Run of a study."""
    return StatusReader(resolved.root, resolved.study.name).read(resolved.points, jobs=jobs_of(resolved))


def jobs_of(resolved: ResolvedStudy) -> dict[str, JobView]:
    """Return the schedulers' views of a study's jobs by run id; print a warning if a scheduler does not answer."""
    folder = resolved.root.study(resolved.study.name)
    if not has_jobs(resolved.root, resolved.study.name):
        return {}
    try:
        ledger = open_with_joined(resolved.root, resolved.study.name)
    except SchedulerUnavailable as gone:
        warn(f"{gone}; {FROM_JOURNALS}")
        return {}
    if ledger.problem:
        warn(f"{ledger.problem}; {FROM_JOURNALS}")
    _warn_of_elsewhere(ledger, folder)
    return jobs_of_runs(ledger)


def _warn_of_elsewhere(ledger: Ledger, folder: Path) -> None:
    """Warn of unfinished arrays of other clusters, whose jobs are unknown here."""
    control = Control(folder / "control.jsonl")
    for name, cluster in ledger.elsewhere.items():
        array = ledger.arrays[name]
        left = unfinished([run for task in array.tasks for run in task.run_dirs], control)
        if left:
            job = f"job {array.job_id}" if array.job_id else f"a submission of {name}"
            warn(
                f"{counted(len(left), 'run')} left to {job} of SLURM cluster {cluster}, which cannot be asked from "
                f"here: check it there; if that cluster no longer exists, remove {folder}/arrays/{name}.json"
            )


def begun(resolved: ResolvedStudy) -> list[RunStatus]:
    """Return the state of every Run; raises InputError if no Run was ever trained here."""
    rows = rows_of(resolved)
    if all(row.state in {RunState.NEW, RunState.CANCELLED} for row in rows):
        name = resolved.study.name
        raise InputError(f"study {name}: no run has been trained under {resolved.root.path}; submit it first")
    return rows


def choose(rows: list[RunStatus], prefixes: Sequence[str] | None) -> list[RunStatus]:
    """Return the rows whose ids start with these prefixes, all rows without prefixes.

    Raises InputError unless each prefix matches one row.
    """
    if not prefixes:
        return rows
    chosen = []
    for prefix in prefixes:
        found = [row for row in rows if row.run_id.startswith(prefix)]
        if not found:
            known = ", ".join(row.run_id for row in rows[:5]) + (", ..." if len(rows) > 5 else "")
            raise InputError(f"no run id of this study starts with {prefix!r}; its runs are {known}")
        if len(found) > 1:
            raise InputError(f"{len(found)} run ids of this study start with {prefix!r}; give more of the id")
        chosen += found
    return chosen


def planned(
    study: str, root: Path | None, changes: Sequence[str] | None, cluster: str | None
) -> tuple[ResolvedStudy, Plan]:
    """Open a study and plan the Runs that are left, for this machine or a cluster; starts nothing."""
    resolved = open_study(study, root, changes, fetch=False)
    profile = load_profile(cluster) if cluster else None
    if profile is not None:
        profile.check_container(resolved.places)
    made = plan_of(resolved, cluster)
    if profile is not None and (shares := describe_shares(made.missing, profile, "auto")):
        note = ("packing", f"--on auto trains {'; '.join(shares)}")
        made = replace(made, notes=(*made.notes, note))
    return resolved, made


def plan_of(resolved: ResolvedStudy, cluster: str | None) -> Plan:
    """Plan the Runs of a study that are left, for this machine or a cluster."""
    return plan_for(resolved, load_profile(cluster).cluster() if cluster else this_machine())


def plan_for(resolved: ResolvedStudy, cluster: Cluster, jobs: Mapping[str, JobView] | None = None) -> Plan:
    """Plan the Runs of a study that are left; `jobs` are its jobs, which are looked up if not given."""
    known = jobs_of(resolved) if jobs is None else jobs
    try:
        return make_plan(resolved.study, resolved.points, resolved.corpus, resolved.root, cluster, known)
    except InputError as error:
        raise InputError(f"{resolved.where}: {error}") from error
