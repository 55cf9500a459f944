"""Records of job arrays under ROOT/studies/NAME/arrays, and the logs of their jobs under logs/slurm."""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from harness.common.disk import write_atomically
from harness.common.format import counted
from harness.common.process import identify_process
from harness.dispatch.base import Handle, Task
from harness.dispatch.part import Part
from harness.plan.allocation import Shape
from harness.plan.container import Container
from harness.record.jobs import SchedulerUnavailable
from harness.record.root import read_model
from harness.record.trust import believe
from harness.study.run import Frozen
from ssmttm.errors import InputError
from ssmttm.files import canonical_json

LOGS = Path("logs", "slurm")
"""Folder below a study's directory with a folder for each array: logs of submitit and of the batch scripts."""


class Array(Frozen):
    """ROOT/studies/NAME/arrays/NAME.json: an array of jobs, written before it is submitted."""

    name: str
    """Unique name, also in SLURM."""
    shape: Shape
    """Resources of each job."""
    tasks: tuple[Annotated[Part | Task, Field(union_mode="left_to_right")], ...]
    packed: bool = False
    """True if one job trains all tasks, packed by Ray on its GPUs; False if each task is an element of the array."""
    device: str = "GPU"
    """Kind of device that each rank has to itself: a GPU, or a core on machines without GPUs."""
    process: dict[str, Any]
    """Identity of the submitting process."""
    t: float
    copy_of_code: str | None = None
    """State of the code whose copy the jobs run from; null if they run the code installed when they start."""
    container: Container | None = None
    """Container that its ranks run in; null if they run with the Python that submitted them."""
    ray_address: str | None = None
    """Address of the job server of the Ray cluster that trains all tasks; null if SLURM does."""
    job_id: str | None = None
    """Job number in SLURM, or job name in Ray; null until the array is known to have been submitted."""
    slurm_cluster: str | None = None
    """SLURM's name of the cluster it was submitted to; null for Ray clusters, or if not recorded."""
    is_void: bool = False
    """True if the array is known never to have been submitted."""
    backend: str | None = None
    """Registered name of the backend it was submitted to; null for SLURM and for existing Ray clusters."""
    after: tuple[str, ...] = ()
    """Jobs that must be over before its tasks begin."""

    @property
    def backend_name(self) -> str:
        """Registered name of its backend."""
        ours = "ray-cluster" if self.ray_address is not None else "ray" if self.packed else "slurm"
        return self.backend or ours

    @property
    def elements(self) -> int:
        """Number of its jobs."""
        return 1 if self.packed else len(self.tasks)

    @property
    def digest(self) -> str:
        """SHA-256 of what its jobs do, which their command lines hold: others may write ROOT, and not those."""
        fields = {"name", "shape", "tasks", "packed", "device", "ray_address"}
        does = self.model_dump(mode="json", include=fields | ({"container"} if self.container else set()))
        return hashlib.sha256(canonical_json(does).encode()).hexdigest()

    @property
    def allocation(self) -> str:
        """Description of the resources of a packed array's job."""
        each = " each" if self.shape.nodes > 1 else ""
        return (
            f"{counted(self.shape.nodes, 'node')} with {counted(self.shape.ranks_a_node, self.device)}{each}"
        )

    def job_of(self, index: int) -> str:
        """Return the id of the job that trains a task of a submitted array."""
        if self.ray_address is not None:
            return str(self.job_id)
        return f"{self.job_id}_{0 if self.packed else index}"

    def handles(self) -> list[Handle]:
        """Return a handle for each task."""
        ids = [self.job_of(index) if self.job_id else "" for index in range(len(self.tasks))]
        return [Handle(task, job, self.name, self.t) for task, job in zip(self.tasks, ids, strict=True)]


def new_name() -> str:
    """Return a unique name for an array."""
    return f"ssmscale-{uuid.uuid4().hex[:12]}"


def new_array(name: str, shape: Shape, tasks: Sequence[Task], **more: Any) -> Array:
    """Return an array for this process to submit."""
    after = tuple(dict.fromkeys(job for task in tasks for job in task.after))
    facts = {"process": identify_process(), "t": time.time(), "after": after}
    return Array(name=name, shape=shape, tasks=tuple(tasks), **facts, **more)


class ArrayStore:
    """The arrays of one study, recorded under ROOT/studies/NAME/arrays."""

    def __init__(self, study_dir: Path) -> None:
        self.folder = study_dir / "arrays"

    def write(self, array: Array) -> None:
        """Record an array, in place of an earlier record of it."""
        left_out = {key for key in ("backend", "container", "after") if not getattr(array, key)}
        write_atomically(self.path_of(array), array.model_dump_json(indent=1, exclude=left_out) + "\n")

    def path_of(self, array: Array) -> Path:
        """Return the file of an array, from which its jobs read their tasks."""
        return self.folder / f"{array.name}.json"

    def submit(self, array: Array, call: Callable[[Array], str]) -> list[Handle]:
        """Record an array, submit it by a call that returns its job's number, and record the number."""
        self.write(array)
        try:
            job_id = call(array)
        except (
            SchedulerUnavailable
        ):  # this process submits it no longer: the ledger asks the scheduler for its name
            self.write(array.model_copy(update={"process": {**array.process, "pid": 0}}))
            raise
        submitted = array.model_copy(update={"job_id": job_id})
        self.write(submitted)
        return submitted.handles()

    def read(self) -> dict[str, Array]:
        """Return every array by name, oldest first."""
        arrays = [read_model(path, Array) for path in self.folder.glob("ssmscale-*.json")]
        return {array.name: array for array in sorted(arrays, key=lambda array: (array.t, array.name))}


def read_array(path: Path, digest: str | None) -> Array:
    """Read the array that a job's command names; raises InputError if it is not what was submitted.

    Without a digest, as in jobs of earlier versions, no other user may be able to write the file.
    """
    array = read_model(path, Array)
    if digest is None:
        believe(path, "what this job executes", "submit again")
    elif array.digest != digest:
        raise InputError(
            f"{path}: was changed after this job was submitted, and is not executed; submit again"
        )
    return array


def packed_folder(study_dir: Path, name: str) -> Path:
    """Return the folder of a packed array's job: the address of its Ray in ray.json, and its logs."""
    return study_dir / LOGS / name


def batch_logs(study_dir: Path, job_id: str) -> list[Path]:
    """Return the logs of a job's batch script."""
    return sorted((study_dir / LOGS).glob(f"*/{job_id}_*.out"))
