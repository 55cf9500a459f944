"""Jobs on a SLURM cluster, through submitit: one array for each shape of resources, split where the site says so.

What a job executes is a plain command with a path and an index, no pickle: it survives an upgrade of Python, and a
requeued job reads what it is to do from ROOT. submitit writes the batch file and calls sbatch. An array is written
down before it is submitted and carries a name of its own, so that whoever finds one without a job id can ask SLURM
whether it was submitted.
"""

from __future__ import annotations

import shlex
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from harness.code_copy import running_from
from harness.dispatch.base import Handle, Job, JobState
from harness.dispatch.ray_jobs import RayGone, RayJobs
from harness.dispatch.sbatch import Request, sbatch
from harness.dispatch.slurm_queue import JobView, SchedulerGone, call, read_jobs
from harness.process import identify_process, process_is_alive
from harness.profile import Profile
from harness.run import Count, Frozen, Positive
from harness.rundir import read_model, write_atomically
from ssmttm.errors import InputError

LOGS = Path("logs", "slurm")
"""Below a study's directory: a folder an array, with what submitit and the batch scripts write."""
UNSEEN_SECONDS = 300.0
"""How long an array without a job may be in the hands of a submission on another host before it counts as lost."""
ORPHAN_SECONDS = 3.0
"""Age an array has before SLURM is asked whether it was submitted: sbatch outlives the submission that was killed."""


class Shape(Frozen):
    """Resources that all jobs of an array share."""

    nodes: Count
    ranks: Count
    """Ranks in all, as many on each node."""
    threads: Count
    """CPU cores a rank."""
    memory_gib: Positive
    """Memory a node, GiB."""

    @property
    def ranks_a_node(self) -> int:
        """Ranks on each node: its tasks, and its GPUs."""
        return self.ranks // self.nodes


class Task(Frozen):
    """What one element of an array trains."""

    series_id: str
    run_dirs: tuple[Path, ...]
    ranks: Count = 1
    """In a packed array what the Series takes of the allocation: ranks, and cores of each."""
    threads: Count = 1
    gpu_fraction: Positive = 1.0
    """Share of a GPU each rank takes; below 1 only where there is one rank."""
    seconds: float = 0.0
    """Seconds of training that are left of it by the plan."""
    architecture: str = ""


class Array(Frozen):
    """ROOT/studies/NAME/arrays/NAME.json: an array of jobs, written before it is submitted."""

    name: str
    """Its name in SLURM too, and nobody else's."""
    shape: Shape
    tasks: tuple[Task, ...]
    packed: bool = False
    """Whether one job trains all the tasks, packed on its GPUs by Ray, and not an element each its own."""
    device: str = "GPU"
    """What a rank of its shape has to itself: a GPU, or a core where there are none."""
    process: dict[str, Any]
    """The submission that wrote it."""
    t: float
    copy_of_code: str | None = None
    """State of the code whose copy its jobs run from; null where they run what is installed when they start."""
    ray_address: str | None = None
    """The Ray cluster whose job trains all the tasks, and not SLURM's: the address of its job server."""
    job_id: str | None = None
    """SLURM's number of it, or Ray's name of it; null until it is known to have been submitted."""
    is_void: bool = False
    """Whether it was found never to have been submitted."""

    def job_of(self, index: int) -> str:
        """SLURM's or Ray's id of the job that trains a task, once the array is submitted."""
        if self.ray_address is not None:
            return str(self.job_id)
        return f"{self.job_id}_{0 if self.packed else index}"


def new_name() -> str:
    """A name for an array that no other has."""
    return f"ssmscale-{uuid.uuid4().hex[:12]}"


def shape_of(job: Job, profile: Profile) -> Shape:
    """The resources a job asks for on a cluster: its ranks' share of each node's memory."""
    a_node = job.ranks // job.nodes
    most = profile.gpus or max(1, profile.cores // job.threads)
    memory = round(profile.memory_gib * min(1.0, a_node / most), 2)
    return Shape(nodes=job.nodes, ranks=job.ranks, threads=job.threads, memory_gib=max(0.5, memory))


def task_of(job: Job) -> Task:
    """A job as an array's file has it."""
    return Task(
        series_id=job.series_id,
        run_dirs=job.run_dirs,
        ranks=job.ranks,
        threads=job.threads,
        gpu_fraction=job.gpu_fraction,
        seconds=job.seconds,
        architecture=job.architecture,
    )


def split_arrays(jobs: Sequence[Job], profile: Profile) -> list[tuple[Shape, list[Job]]]:
    """Jobs by shape in the order of their first, each shape split at the site's limit; indices begin at 0 anew."""
    by_shape: dict[Shape, list[Job]] = {}
    for job in jobs:
        by_shape.setdefault(shape_of(job, profile), []).append(job)
    most = profile.limits.array_size
    return [
        (shape, members[first : first + most])
        for shape, members in by_shape.items()
        for first in range(0, len(members), most)
    ]


class ArrayBook:
    """The arrays of one study, as written down under ROOT/studies/NAME/arrays."""

    def __init__(self, study_dir: Path) -> None:
        self.folder = study_dir / "arrays"

    def write(self, array: Array) -> None:
        """Write an array down, or what has become known of it."""
        write_atomically(self.folder / f"{array.name}.json", array.model_dump_json(indent=1) + "\n")

    def read(self) -> dict[str, Array]:
        """Every array by name, oldest first."""
        arrays = [read_model(path, Array) for path in self.folder.glob("ssmscale-*.json")]
        return {array.name: array for array in sorted(arrays, key=lambda array: (array.t, array.name))}

    def read_again(self, array: Array) -> Array:
        """What is written down of an array now."""
        return read_model(self.folder / f"{array.name}.json", Array)


@dataclass(frozen=True)
class Book:
    """What is written down and what SLURM says, put together."""

    arrays: Mapping[str, Array]
    views: Mapping[str, JobView]
    unheard: Mapping[str, str] = field(default_factory=dict)
    """Arrays whose Ray cluster does not answer, and why."""

    @property
    def problem(self) -> str | None:
        """Why something is not known of which the journals may know; None where all is."""
        return "; ".join(f"Ray: {why}" for why in dict.fromkeys(self.unheard.values())) or None

    def job_of(self, array: Array, index: int) -> JobView | None:
        """SLURM's word on what trains a task; None where it has never heard of it."""
        return self.views.get(array.job_of(index))

    def elements(self) -> Iterator[tuple[Array, int, Task, JobView | None]]:
        """Every element of every array that was submitted, oldest first."""
        for array in self.arrays.values():
            if array.job_id is not None:
                for index, task in enumerate(array.tasks):
                    yield array, index, task, self.job_of(array, index)

    def holds(self, name: str, series_id: str) -> bool:
        """Whether a live job of that array is to train a Series, or may yet be."""
        array = self.arrays.get(name)
        if array is None or array.is_void:
            return False
        if array.job_id is None:
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
    # Who is gone before it is asked has submitted nothing that the answer does not know of.
    gone = {array.name for array in live if array.job_id is None and is_given_up(array.process, array.t)}
    if gone:
        age = time.time() - max(arrays[name].t for name in gone)
        time.sleep(min(ORPHAN_SECONDS, max(0.0, ORPHAN_SECONDS - age)))
    views: dict[str, JobView] = {}
    asked = [array for array in live if array.ray_address is None]
    if asked:
        since = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(min(array.t for array in asked) - 86400))
        views = read_jobs([array.name for array in asked], since)
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
    return Book(arrays, views, unheard)


def jobs_of_runs(book: Book) -> dict[str, JobView]:
    """The newest job of each Run, by run id, as SLURM sees it; arrays not yet answered for count as waiting."""
    found: dict[str, JobView] = {}
    for array, _, task, view in book.elements():
        for folder in task.run_dirs:
            if view is not None:
                found[folder.name] = replace(view, packed=True) if array.packed else view
            elif array.job_id and folder.name not in found and array.name not in book.unheard:
                found[folder.name] = JobView(array.job_id, array.name, JobState.ENDED, "UNKNOWN", 0.0, "")
    for array in book.arrays.values():
        if array.job_id is None and not array.is_void:
            waiting = JobView("", array.name, JobState.QUEUED, "SUBMITTING", 0.0, "", "being submitted")
            found |= {folder.name: waiting for task in array.tasks for folder in task.run_dirs}
    return found


def is_given_up(process: Mapping[str, Any], t: float) -> bool:
    """Whether a submission that began something at `t` is gone, as far as can be told from here."""
    if process.get("host") == identify_process()["host"]:
        return not process_is_alive(process)
    return time.time() - t > UNSEEN_SECONDS


class SlurmDispatcher:
    """Implements Dispatcher with arrays of SLURM jobs; everything outlives the process that submits."""

    def __init__(self, profile: Profile, study_dir: Path, hours: float | None = None) -> None:
        self.profile, self.study_dir = profile, study_dir.absolute()
        self.hours = hours
        self.copy: Path | None = None
        """A copy of the code that jobs are to run from."""
        self.book = ArrayBook(self.study_dir)
        self.log_dir = self.study_dir / LOGS
        if "%" in str(self.study_dir):
            raise InputError(
                f"--root: {study_dir}: SLURM reads % in a log's path as a pattern; choose another"
            )

    def submit(self, jobs: Sequence[Job]) -> list[Handle]:
        """Submit jobs that nobody else claims, one sbatch an array; raises SchedulerGone."""
        handles = []
        for shape, members in split_arrays(jobs, self.profile):
            handles += self.submit_array(new_name(), shape, members)
        return handles

    def submit_array(
        self, name: str, shape: Shape, jobs: Sequence[Job], *, packed: bool = False, device: str = "GPU"
    ) -> list[Handle]:
        """Write an array down, submit it, and write down SLURM's number of it.

        packed: whether one job of that shape trains all jobs, and not an element of the array each; on what devices.
        """
        array = Array(
            name=name,
            shape=shape,
            tasks=tuple(map(task_of, jobs)),
            packed=packed,
            device=device,
            process=identify_process(),
            t=time.time(),
            copy_of_code=self.copy.name if self.copy else None,
        )
        self.book.write(array)
        try:
            job_id = self._sbatch(array)
        except (
            SchedulerGone
        ):  # nobody is about to submit it any more: whoever looks next asks SLURM by its name
            self.book.write(array.model_copy(update={"process": {**array.process, "pid": 0}}))
            raise
        submitted = array.model_copy(update={"job_id": job_id})
        self.book.write(submitted)
        return [Handle(job, submitted.job_of(index)) for index, job in enumerate(jobs)]

    def poll(self, handles: Sequence[Handle]) -> Mapping[Handle, JobState]:
        """Where each job is; one that SLURM has forgotten has ended."""
        views = open_book(self.study_dir).views
        return {
            handle: views[handle.job_id].state if handle.job_id in views else JobState.ENDED
            for handle in handles
        }

    def log_paths(self, handle: Handle) -> list[Path]:
        """A file a rank, and what the batch script said."""
        ranks = [handle.job.log_dir / f"rank-{rank}.log" for rank in range(handle.job.ranks)]
        return [*ranks, *batch_logs(self.study_dir, handle.job_id)]

    def close(self) -> None:
        """Nothing to let go of: the jobs are SLURM's."""

    def _sbatch(self, array: Array) -> str:
        """Hand an array to SLURM; returns its number."""
        shape = array.shape
        file = str(self.book.folder / f"{array.name}.json")
        command = [sys.executable, "-u", "-m", "harness.slurm_job", file]
        if array.packed:  # in the shell's place, so that SLURM's signals find it
            command = ["exec", sys.executable, "-u", "-m", "harness.ray_job", file]
        line = running_from(self.copy, command) if self.copy else shlex.join(command)
        request = Request(
            name=array.name,
            elements=1 if array.packed else len(array.tasks),
            nodes=shape.nodes,
            tasks_a_node=1 if array.packed else shape.ranks_a_node,
            cores_a_task=shape.threads * (shape.ranks_a_node if array.packed else 1),
            gpus_a_node=shape.ranks_a_node,
            memory_gib=shape.memory_gib,
            hours=self.hours or self.profile.limits.hours,
            tells_script=array.packed,  # which is there too while Ray, its only step, is being started again
        )
        return sbatch(request, self.profile, self.log_dir / array.name, line)


def packed_folder(study_dir: Path, name: str) -> Path:
    """Where the job of a packed array of that name keeps what others read: ray.json, and logs beside the batch log."""
    return study_dir / LOGS / name


def batch_logs(study_dir: Path, job_id: str) -> list[Path]:
    """What the batch script of a study's job said, before, beside and after the ranks."""
    return sorted((study_dir / LOGS).glob(f"*/{job_id}_*.out"))


def cancel_jobs(job_ids: Sequence[str]) -> None:
    """scancel these jobs and no others, which then save; those that are over already do not matter."""
    if job_ids:
        call("scancel", *job_ids)
