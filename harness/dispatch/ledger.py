"""The ledger of a study: the records of its arrays, and the schedulers' views of their jobs.

If a submission was cut short, the ledger asks the scheduler for the array's name and completes the record. Arrays of
another SLURM cluster cannot be looked up from here and count as live there: two clusters may share a ROOT.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from harness.common.process import identify_process, process_is_alive
from harness.dispatch.arrays import Array, ArrayStore
from harness.dispatch.base import Backend, Handle, SubmitTarget, Task
from harness.dispatch.registry import open_backend
from harness.record.control import Control, joined_in
from harness.record.hours import JobTime
from harness.record.jobs import ELSEWHERE, LIVE, JobState, JobView, SchedulerUnavailable
from harness.record.root import Root, read_model, read_run
from harness.record.series import STUDY
from harness.record.trust import doubt, may_receive_logins
from ssmttm.errors import InputError

UNSEEN_SECONDS = 300.0
"""Age at which an array without a job, recorded by a submission on another host, counts as lost."""
ORPHAN_SECONDS = 10.0
"""Age at which SLURM is asked for an array whose submission was killed: its sbatch may still have been running."""


@dataclass(frozen=True)
class Ledger:
    """The arrays of a study and the schedulers' views of their jobs."""

    arrays: Mapping[str, Array]
    views: Mapping[str, JobView]
    backends: Mapping[str, Backend]
    """Backend of each array."""
    unheard: Mapping[str, str] = field(default_factory=dict)
    """Arrays whose scheduler does not answer and may have ended for good, and the reason."""
    elsewhere: Mapping[str, str] = field(default_factory=dict)
    """Arrays of other SLURM clusters, and the names of the clusters."""
    joined: Mapping[str, JobView] = field(default_factory=dict)
    """Jobs of other submissions whose work Runs of this study have joined, by run id."""
    joined_times: Mapping[str, JobTime] = field(default_factory=dict)
    """Accounted time of these jobs, by job id."""

    @property
    def problem(self) -> str | None:
        """Reason why some jobs are unknown; None if all are known."""
        return "; ".join(dict.fromkeys(self.unheard.values())) or None

    def job_of(self, array: Array, index: int) -> JobView | None:
        """Return the job that trains a task; None if its scheduler is another cluster's or does not know the job."""
        if array.name in self.elsewhere:  # here the number belongs to another job
            return None
        return self.views.get(array.job_of(index))

    def elements(self) -> Iterator[tuple[Array, Handle, JobView | None]]:
        """Yield every task of every submitted array with its job, oldest array first."""
        for array in self.arrays.values():
            if array.job_id is not None:
                for index, handle in enumerate(array.handles()):
                    yield array, handle, self.job_of(array, index)

    def holds(self, name: str, series_id: str) -> bool:
        """Return True if a live job of this array trains a Series or will; jobs of other clusters count as live."""
        array = self.arrays.get(name)
        if array is None or array.is_void:
            return False
        return array.job_id is None or name in self.elsewhere or (name, series_id) in self._live

    @cached_property
    def _live(self) -> set[tuple[str, str]]:
        """Array and Series of each task whose job is live."""
        return {
            (array.name, handle.task.series_id)
            for array, handle, view in self.elements()
            if view is not None and view.state in LIVE
        }


def open_ledger(study_dir: Path) -> Ledger:
    """Read the records of a study's arrays, ask the schedulers, and complete records of interrupted submissions.

    Raises SchedulerUnavailable if a scheduler does not answer, unless it may have ended for good.
    """
    store = ArrayStore(study_dir)
    arrays = store.read()
    backends = open_backends(study_dir, arrays)
    schedulers: dict[tuple[str, str | None], list[Array]] = {}
    unheard = {name: why for name, array in arrays.items() if (why := _doubt(store, array))}
    for array in arrays.values():
        if not array.is_void and array.name not in unheard:
            schedulers.setdefault((backends[array.name].scheduler, array.ray_address), []).append(array)
    groups = {backends[members[0].name]: members for members in schedulers.values()}
    elsewhere = _of_other_clusters(groups)
    asked = {
        backend: live
        for backend, members in groups.items()
        if (live := [array for array in members if array.name not in elsewhere])
    }
    # If a submission ended before the scheduler is asked, the answer covers all that it submitted.
    gone = {
        array.name
        for array in chain.from_iterable(asked.values())
        if array.job_id is None and is_given_up(array.process, array.t)
    }
    if gone:
        age = time.time() - max(arrays[name].t for name in gone)
        time.sleep(min(ORPHAN_SECONDS, max(0.0, ORPHAN_SECONDS - age)))
    views: dict[str, JobView] = {}
    for backend, members in asked.items():
        try:
            views |= backend.views([handle for array in members for handle in array.handles()])
        except SchedulerUnavailable as silence:
            if not silence.may_be_over:
                raise
            unheard |= {array.name: f"{silence.scheduler}: {silence}" for array in members}
    ids = {view.name: view.job_id.split("_")[0] for view in views.values()}
    for array in chain.from_iterable(asked.values()):
        if array.name in unheard or array.job_id is not None or array.name not in {*ids, *gone}:
            continue
        # The submission may have recorded its number.
        arrays[array.name] = read_model(store.path_of(array), Array)
        if arrays[array.name].job_id is None and not arrays[array.name].is_void:
            known = {"job_id": ids[array.name]} if array.name in ids else {"is_void": True}
            arrays[array.name] = array.model_copy(update=known)
            store.write(arrays[array.name])
    return Ledger(arrays, views, backends, unheard, elsewhere)


def open_with_joined(root: Root, study_name: str) -> Ledger:
    """Open the ledger of a study, with the jobs of others whose work its Runs have joined; raises as `open_ledger`."""
    study_dir = root.study(study_name)
    own = open_ledger(study_dir)
    by_study: dict[str, dict[str, str]] = {}
    for run_id, (other, array) in joined_in(Control(study_dir / "control.jsonl").read()).items():
        if array and STUDY.fullmatch(other):
            by_study.setdefault(other, {})[run_id] = array
    joined: dict[str, JobView] = {}
    times: dict[str, JobTime] = {}
    unheard = dict(own.unheard)
    for other, runs in by_study.items():
        ledger = own if other == study_name else open_ledger(root.study(other))
        unheard |= {name: why for name, why in ledger.unheard.items() if name in runs.values()}
        views = _views_of_series(ledger)
        accounted = times_of_jobs(ledger)
        for run_id, array in runs.items():
            with suppress(InputError):
                series_id = read_run(root.run(run_id)).series_id
                if (view := views.get((array, series_id))) is not None:
                    joined[run_id] = replace(view, study=other)
                    if view.job_id in accounted:
                        times[view.job_id] = accounted[view.job_id]
    return replace(own, joined=joined, joined_times=times, unheard=unheard)


def _doubt(store: ArrayStore, array: Array) -> str | None:
    """Return why the Ray cluster of an array is not asked, which would get this user's token; None if it may be."""
    address = array.ray_address
    if address is None or may_receive_logins(address, path := store.path_of(array)):
        return None
    return f"Ray: {address}: not asked, since {path} {doubt(path)}"


def open_backends(study_dir: Path, arrays: Mapping[str, Array]) -> dict[str, Backend]:
    """Return the backend of each array."""
    opened: dict[tuple[str, str | None], Backend] = {}
    for array in arrays.values():
        key = (array.backend_name, array.ray_address)
        if key not in opened:
            target = SubmitTarget(array.backend_name, ray_address=array.ray_address)
            opened[key] = open_backend(array.backend_name, study_dir, target)
    return {name: opened[array.backend_name, array.ray_address] for name, array in arrays.items()}


def _of_other_clusters(groups: Mapping[Backend, Sequence[Array]]) -> dict[str, str]:
    """Return the arrays that were submitted to other clusters than this one, and the names of the clusters."""
    elsewhere: dict[str, str] = {}
    for backend, members in groups.items():
        if any(array.slurm_cluster for array in members):
            here = backend.cluster_name()
            elsewhere |= {a.name: a.slurm_cluster for a in members if a.slurm_cluster not in {None, here}}
    return elsewhere


def jobs_of_runs(ledger: Ledger) -> dict[str, JobView]:
    """Return the newest job of each Run, by run id.

    Jobs of arrays that are being submitted, and of other clusters, count as queued.
    """
    found: dict[str, JobView] = {}
    for _, task, view in _jobs(ledger):
        for folder in task.run_dirs:
            if view.slurm_state != "UNKNOWN" or folder.name not in found:
                found[folder.name] = view
    return found | dict(ledger.joined)


def _views_of_series(ledger: Ledger) -> dict[tuple[str, str], JobView]:
    """Return the job of each task, by the names of its array and its Series."""
    return {(array.name, task.series_id): view for array, task, view in _jobs(ledger)}


def _jobs(ledger: Ledger) -> Iterator[tuple[Array, Task, JobView]]:
    """Yield every task with its job, in the order of submission; without those whose scheduler is not heard."""
    for array, handle, view in ledger.elements():
        if array.name in ledger.elsewhere:
            cluster = ledger.elsewhere[array.name]
            held = JobView(str(array.job_id), array.name, JobState.QUEUED, ELSEWHERE, 0.0, "")
            reason = f"held by SLURM cluster {cluster}, which cannot be asked from here"
            yield array, handle.task, replace(held, reason=reason, packed=array.packed)
        elif view is not None:
            yield array, handle.task, replace(view, packed=True) if array.packed else view
        elif array.job_id and array.name not in ledger.unheard:
            yield array, handle.task, JobView(array.job_id, array.name, JobState.ENDED, "UNKNOWN", 0.0, "")
    for array in ledger.arrays.values():
        if array.job_id is None and not array.is_void and array.name not in ledger.elsewhere:
            waiting = JobView("", array.name, JobState.QUEUED, "SUBMITTING", 0.0, "", "being submitted")
            yield from ((array, task, waiting) for task in array.tasks)


def is_given_up(process: Mapping[str, Any], t: float) -> bool:
    """Return True if the submission that recorded an array or a lease at time `t` seems to have ended."""
    if process.get("host") == identify_process()["host"]:
        return not process_is_alive(process)
    return time.time() - t > UNSEEN_SECONDS


def times_of_jobs(ledger: Ledger) -> dict[str, JobTime]:
    """Return the accounted time of each job by job id; empty without accounting.

    Packed jobs are left out: their devices serve many Series, whose journals tell the time of each.
    """
    own = {
        view.job_id: JobTime(handle.task.series_id, view.accounted_seconds * array.shape.ranks)
        for array, handle, view in ledger.elements()
        if view is not None and view.accounted_seconds is not None and not array.packed
    }
    return {**ledger.joined_times, **own}
