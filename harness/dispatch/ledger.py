"""What is written down of a study's arrays and what SLURM and Ray say of their jobs, put together.

An array whose submission was cut short is settled by asking for its name. One of another SLURM cluster cannot be asked
for here and counts as held there: two clusters may share a ROOT.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from harness.common.process import identify_process, process_is_alive
from harness.dispatch.arrays import Array, ArrayBook, Task
from harness.dispatch.ray.job_server import RayGone, RayJobs
from harness.dispatch.slurm.queue import cluster_name, read_jobs
from harness.record.jobs import ELSEWHERE, JobState, JobView
from harness.record.status import JobTime

UNSEEN_SECONDS = 300.0
"""How long an array without a job may be in the hands of a submission on another host before it counts as lost."""
ORPHAN_SECONDS = 10.0
"""Age an array has before SLURM is asked whether it was submitted: sbatch outlives the submission that was killed."""


@dataclass(frozen=True)
class Book:
    """What is written down and what SLURM says, put together."""

    arrays: Mapping[str, Array]
    views: Mapping[str, JobView]
    unheard: Mapping[str, str] = field(default_factory=dict)
    """Arrays whose Ray cluster does not answer, and why."""
    elsewhere: Mapping[str, str] = field(default_factory=dict)
    """Arrays of other SLURM clusters than the one that is asked from here, and the names of those."""

    @property
    def problem(self) -> str | None:
        """Why something is not known of which the journals may know; None where all is."""
        return "; ".join(f"Ray: {why}" for why in dict.fromkeys(self.unheard.values())) or None

    def job_of(self, array: Array, index: int) -> JobView | None:
        """SLURM's word on what trains a task; None where it has never heard of it, or is another cluster's."""
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
            (view := self.job_of(array, index)) is not None and view.state in _LIVE
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


_LIVE = frozenset({JobState.QUEUED, JobState.RUNNING})


def open_book(study_dir: Path) -> Book:
    """Read what is written down and ask SLURM and Ray about it, settling arrays whose submission was cut short.

    Raises SchedulerGone where SLURM does not answer; a Ray cluster that does not may have ended for good.
    """
    book = ArrayBook(study_dir)
    arrays = book.read()
    live = [array for array in arrays.values() if not array.is_void]
    elsewhere: dict[str, str] = {}
    if any(array.slurm_cluster for array in live):
        here = cluster_name()
        elsewhere = {a.name: a.slurm_cluster for a in live if a.slurm_cluster not in {None, here}}
        live = [array for array in live if array.name not in elsewhere]
    # Who is gone before it is asked has submitted nothing that the answer does not know of.
    gone = {array.name for array in live if array.job_id is None and is_given_up(array.process, array.t)}
    if gone:
        age = time.time() - max(arrays[name].t for name in gone)
        time.sleep(min(ORPHAN_SECONDS, max(0.0, ORPHAN_SECONDS - age)))
    views: dict[str, JobView] = {}
    asked = [array for array in live if array.ray_address is None]
    if asked:
        views = read_jobs([array.name for array in asked], min(array.t for array in asked))
    unheard: dict[str, str] = {}
    for address in dict.fromkeys(array.ray_address for array in live if array.ray_address is not None):
        there = [array for array in live if array.ray_address == address]
        try:
            known_there = RayJobs(address).views()
        except RayGone as gone_ray:
            unheard |= {array.name: str(gone_ray) for array in there}
        else:
            views |= {array.name: known_there[array.name] for array in there if array.name in known_there}
            asked += there
    ids = {view.name: view.job_id.split("_")[0] for view in views.values()}
    for array in asked:
        if array.job_id is not None or (array.name not in ids and array.name not in gone):
            continue
        arrays[array.name] = book.read_again(array)
        if arrays[array.name].job_id is None and not arrays[array.name].is_void:
            known = {"job_id": ids[array.name]} if array.name in ids else {"is_void": True}
            arrays[array.name] = array.model_copy(update=known)
            book.write(arrays[array.name])
    return Book(arrays, views, unheard, elsewhere)


def jobs_of_runs(book: Book) -> dict[str, JobView]:
    """The newest job of each Run, by run id, as SLURM sees it.

    Arrays not yet answered for, and those of other clusters, count as waiting.
    """
    found: dict[str, JobView] = {}
    for array, _, task, view in book.elements():
        for folder in task.run_dirs:
            if array.name in book.elsewhere:
                found[folder.name] = _held_elsewhere(array, book.elsewhere[array.name])
            elif view is not None:
                found[folder.name] = replace(view, packed=True) if array.packed else view
            elif array.job_id and folder.name not in found and array.name not in book.unheard:
                found[folder.name] = JobView(array.job_id, array.name, JobState.ENDED, "UNKNOWN", 0.0, "")
    for array in book.arrays.values():
        if array.job_id is None and not array.is_void and array.name not in book.elsewhere:
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


def times_of_jobs(book: Book) -> dict[str, JobTime]:
    """By job id, the time of every job that accounting has; nothing without accounting.

    Of a packed array the journals know better: what its job holds is divided among all its Series.
    """
    return {
        view.job_id: JobTime(task.series_id, view.accounted_seconds * array.shape.ranks)
        for array, _, task, view in book.elements()
        if view is not None and view.accounted_seconds is not None and not array.packed
    }
