"""The ledger of a study: what is written down of its arrays, and what their schedulers say of the jobs.

An array whose submission was cut short is settled by asking for its name. One of another SLURM cluster cannot be asked
for here and counts as held there: two clusters may share a ROOT.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from harness.common.process import identify_process, process_is_alive
from harness.dispatch.arrays import Array, ArrayStore
from harness.dispatch.base import Backend, SubmitTarget, Task
from harness.dispatch.registry import open_backend
from harness.record.jobs import ELSEWHERE, LIVE, JobState, JobView, SchedulerUnavailable
from harness.record.status import JobTime

UNSEEN_SECONDS = 300.0
"""How long an array without a job may be in the hands of a submission on another host before it counts as lost."""
ORPHAN_SECONDS = 10.0
"""Age an array has before SLURM is asked whether it was submitted: sbatch outlives the submission that was killed."""


@dataclass(frozen=True)
class Ledger:
    """What is written down and what the schedulers say, put together."""

    arrays: Mapping[str, Array]
    views: Mapping[str, JobView]
    backends: Mapping[str, Backend]
    """Backend of each array."""
    unheard: Mapping[str, str] = field(default_factory=dict)
    """Arrays whose scheduler does not answer and may have ended for good, and why."""
    elsewhere: Mapping[str, str] = field(default_factory=dict)
    """Arrays of other SLURM clusters than the one that is asked from here, and the names of those."""

    @property
    def problem(self) -> str | None:
        """Why something is not known of which the journals may know; None where all is."""
        return "; ".join(dict.fromkeys(self.unheard.values())) or None

    def job_of(self, array: Array, index: int) -> JobView | None:
        """Return the job that trains a task; None where its scheduler knows of none, or is another cluster's."""
        if array.name in self.elsewhere:  # the number is some other job's here
            return None
        return self.views.get(array.job_of(index))

    def elements(self) -> Iterator[tuple[Array, int, Task, JobView | None]]:
        """Every element of every array that was submitted, oldest first."""
        for array in self.arrays.values():
            if array.job_id is not None:
                for index, task in enumerate(array.tasks):
                    yield array, index, task, self.job_of(array, index)

    def holds(self, name: str, series_id: str) -> bool:
        """Whether a live job of that array is to train a Series, or may yet be; another cluster's counts as live."""
        array = self.arrays.get(name)
        if array is None or array.is_void:
            return False
        if array.job_id is None or name in self.elsewhere:
            return True
        return any(
            (view := self.job_of(array, index)) is not None and view.state in LIVE
            for index in self._places.get((name, series_id), ())
        )

    @cached_property
    def _places(self) -> dict[tuple[str, str], list[int]]:
        """By array and Series, the elements that train it."""
        places: dict[tuple[str, str], list[int]] = {}
        for name, array in self.arrays.items():
            for index, task in enumerate(array.tasks):
                places.setdefault((name, task.series_id), []).append(index)
        return places


def open_ledger(study_dir: Path) -> Ledger:
    """Read what is written down and ask the schedulers, settling arrays whose submission was cut short.

    Raises SchedulerUnavailable where one does not answer, unless it may have ended for good.
    """
    store = ArrayStore(study_dir)
    arrays = store.read()
    backends = open_backends(study_dir, arrays)
    groups = _by_scheduler((array for array in arrays.values() if not array.is_void), backends)
    elsewhere = _held_by_others(groups)
    asked = {
        backend: live
        for backend, members in groups.items()
        if (live := [array for array in members if array.name not in elsewhere])
    }
    # A submission that is gone before the question has submitted nothing that the answer does not know of.
    gone = {
        array.name
        for members in asked.values()
        for array in members
        if array.job_id is None and is_given_up(array.process, array.t)
    }
    if gone:
        age = time.time() - max(arrays[name].t for name in gone)
        time.sleep(min(ORPHAN_SECONDS, max(0.0, ORPHAN_SECONDS - age)))
    views: dict[str, JobView] = {}
    unheard: dict[str, str] = {}
    for backend, members in asked.items():
        try:
            views |= backend.views([handle for array in members for handle in array.handles()])
        except SchedulerUnavailable as silence:
            if not silence.may_be_over:
                raise
            unheard |= {array.name: f"{silence.scheduler}: {silence}" for array in members}
    ids = {view.name: view.job_id.split("_")[0] for view in views.values()}
    for array in (array for members in asked.values() for array in members):
        if array.name in unheard or array.job_id is not None:
            continue
        if array.name not in ids and array.name not in gone:
            continue
        arrays[array.name] = store.read_again(array)
        if arrays[array.name].job_id is None and not arrays[array.name].is_void:
            known = {"job_id": ids[array.name]} if array.name in ids else {"is_void": True}
            arrays[array.name] = array.model_copy(update=known)
            store.write(arrays[array.name])
    return Ledger(arrays, views, backends, unheard, elsewhere)


def open_backends(study_dir: Path, arrays: Mapping[str, Array]) -> dict[str, Backend]:
    """Return the backend of each array."""
    opened: dict[tuple[str, str | None], Backend] = {}
    for array in arrays.values():
        key = (array.backend_name, array.ray_address)
        if key not in opened:
            target = SubmitTarget(array.backend_name, ray_address=array.ray_address)
            opened[key] = open_backend(array.backend_name, study_dir, target)
    return {name: opened[array.backend_name, array.ray_address] for name, array in arrays.items()}


def _by_scheduler(arrays: Iterable[Array], backends: Mapping[str, Backend]) -> dict[Backend, list[Array]]:
    """Return the arrays that each scheduler is asked about, by a backend that asks it about all of them."""
    asking: dict[tuple[str, str | None], Backend] = {}
    groups: dict[Backend, list[Array]] = {}
    for array in arrays:
        backend = backends[array.name]
        groups.setdefault(asking.setdefault((backend.scheduler, array.ray_address), backend), []).append(
            array
        )
    return groups


def _held_by_others(groups: Mapping[Backend, Sequence[Array]]) -> dict[str, str]:
    """Return the arrays that were given to other clusters than those asked from here, and the names of those."""
    elsewhere: dict[str, str] = {}
    for backend, members in groups.items():
        if any(array.slurm_cluster for array in members):
            here = backend.cluster_name()
            elsewhere |= {a.name: a.slurm_cluster for a in members if a.slurm_cluster not in {None, here}}
    return elsewhere


def jobs_of_runs(ledger: Ledger) -> dict[str, JobView]:
    """The newest job of each Run, by run id, as its scheduler sees it.

    Arrays not yet answered for, and those of other clusters, count as waiting.
    """
    found: dict[str, JobView] = {}
    for array, _, task, view in ledger.elements():
        for folder in task.run_dirs:
            if array.name in ledger.elsewhere:
                found[folder.name] = _held_elsewhere(array, ledger.elsewhere[array.name])
            elif view is not None:
                found[folder.name] = replace(view, packed=True) if array.packed else view
            elif array.job_id and folder.name not in found and array.name not in ledger.unheard:
                found[folder.name] = JobView(array.job_id, array.name, JobState.ENDED, "UNKNOWN", 0.0, "")
    for array in ledger.arrays.values():
        if array.job_id is None and not array.is_void and array.name not in ledger.elsewhere:
            waiting = JobView("", array.name, JobState.QUEUED, "SUBMITTING", 0.0, "", "being submitted")
            found |= {folder.name: waiting for task in array.tasks for folder in task.run_dirs}
    return found


def _held_elsewhere(array: Array, cluster: str) -> JobView:
    reason = f"in the hands of SLURM cluster {cluster}, which is not asked from here"
    return JobView(
        str(array.job_id), array.name, JobState.QUEUED, ELSEWHERE, 0.0, "", reason, packed=array.packed
    )


def is_given_up(process: Mapping[str, Any], t: float) -> bool:
    """Whether a submission that began something at `t` is gone, as far as can be told from here."""
    if process.get("host") == identify_process()["host"]:
        return not process_is_alive(process)
    return time.time() - t > UNSEEN_SECONDS


def times_of_jobs(ledger: Ledger) -> dict[str, JobTime]:
    """By job id, the time of every job that accounting has; nothing without accounting.

    Of a packed array the journals know better: what its job holds is divided among all its Series.
    """
    return {
        view.job_id: JobTime(task.series_id, view.accounted_seconds * array.shape.ranks)
        for array, _, task, view in ledger.elements()
        if view is not None and view.accounted_seconds is not None and not array.packed
    }
