"""What is written down of arrays of jobs, and where: ROOT/studies/NAME/arrays, and logs/slurm for what jobs say."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from harness.common.disk import write_atomically
from harness.common.format import counted
from harness.common.process import identify_process
from harness.dispatch.base import Handle, Task
from harness.plan.allocation import Shape
from harness.record.jobs import SchedulerUnavailable
from harness.record.root import read_model
from harness.study.run import Frozen

LOGS = Path("logs", "slurm")
"""Below a study's directory: a folder an array, with what submitit and the batch scripts write."""


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
    slurm_cluster: str | None = None
    """SLURM's name of the cluster it was submitted to; null where that is a Ray's, or was not recorded."""
    is_void: bool = False
    """Whether it was found never to have been submitted."""
    backend: str | None = None
    """Registered name of the backend it was submitted to; null for SLURM and for a Ray that is there already."""

    @property
    def backend_name(self) -> str:
        """Registered name of its backend."""
        ours = "ray-cluster" if self.ray_address is not None else "ray" if self.packed else "slurm"
        return self.backend or ours

    @property
    def allocation(self) -> str:
        """Resources of the one job that trains all its tasks, in words."""
        each = " each" if self.shape.nodes > 1 else ""
        return (
            f"{counted(self.shape.nodes, 'node')} with {counted(self.shape.ranks_a_node, self.device)}{each}"
        )

    def job_of(self, index: int) -> str:
        """Return the id of the job that trains a task, once the array is submitted."""
        if self.ray_address is not None:
            return str(self.job_id)
        return f"{self.job_id}_{0 if self.packed else index}"

    def handles(self) -> list[Handle]:
        """Return a handle a task."""
        ids = [self.job_of(index) if self.job_id else "" for index in range(len(self.tasks))]
        return [Handle(task, job, self.name, self.t) for task, job in zip(self.tasks, ids, strict=True)]


def new_name() -> str:
    """Return a name for an array that no other has."""
    return f"ssmscale-{uuid.uuid4().hex[:12]}"


def new_array(name: str, shape: Shape, tasks: Sequence[Task], **more: Any) -> Array:
    """Return an array that this process is about to submit."""
    return Array(
        name=name, shape=shape, tasks=tuple(tasks), process=identify_process(), t=time.time(), **more
    )


class ArrayStore:
    """The arrays of one study, as written down under ROOT/studies/NAME/arrays."""

    def __init__(self, study_dir: Path) -> None:
        self.folder = study_dir / "arrays"

    def write(self, array: Array) -> None:
        """Write an array down, or what has become known of it."""
        left_out = {"backend"} if array.backend is None else None
        text = array.model_dump_json(indent=1, exclude=left_out)
        write_atomically(self.path_of(array), text + "\n")

    def path_of(self, array: Array) -> Path:
        """Return the file of an array, which its jobs are given."""
        return self.folder / f"{array.name}.json"

    def submit(self, array: Array, call: Callable[[Array], str]) -> list[Handle]:
        """Write an array down, submit it by a call that returns its job's number, and write that down."""
        self.write(array)
        try:
            job_id = call(array)
        except SchedulerUnavailable:  # it is no longer about to be submitted: the ledger asks for its name
            self.write(array.model_copy(update={"process": {**array.process, "pid": 0}}))
            raise
        submitted = array.model_copy(update={"job_id": job_id})
        self.write(submitted)
        return submitted.handles()

    def read(self) -> dict[str, Array]:
        """Every array by name, oldest first."""
        arrays = [read_model(path, Array) for path in self.folder.glob("ssmscale-*.json")]
        return {array.name: array for array in sorted(arrays, key=lambda array: (array.t, array.name))}

    def read_again(self, array: Array) -> Array:
        """What is written down of an array now."""
        return read_model(self.path_of(array), Array)


def packed_folder(study_dir: Path, name: str) -> Path:
    """Where the job of a packed array of that name keeps what others read: ray.json, and logs beside the batch log."""
    return study_dir / LOGS / name


def batch_logs(study_dir: Path, job_id: str) -> list[Path]:
    """What the batch script of a study's job said, before, beside and after the ranks."""
    return sorted((study_dir / LOGS).glob(f"*/{job_id}_*.out"))
