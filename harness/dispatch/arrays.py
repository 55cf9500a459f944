"""What is written down of arrays of jobs, and where: ROOT/studies/NAME/arrays, and logs/slurm for what jobs say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.common.disk import write_atomically
from harness.plan.allocation import Shape
from harness.record.root import read_model
from harness.study.run import Count, Frozen, Positive

LOGS = Path("logs", "slurm")
"""Below a study's directory: a folder an array, with what submitit and the batch scripts write."""


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
    slurm_cluster: str | None = None
    """SLURM's name of the cluster it was submitted to; null where that is a Ray's, or was not recorded."""
    is_void: bool = False
    """Whether it was found never to have been submitted."""

    def job_of(self, index: int) -> str:
        """SLURM's or Ray's id of the job that trains a task, once the array is submitted."""
        if self.ray_address is not None:
            return str(self.job_id)
        return f"{self.job_id}_{0 if self.packed else index}"


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


def packed_folder(study_dir: Path, name: str) -> Path:
    """Where the job of a packed array of that name keeps what others read: ray.json, and logs beside the batch log."""
    return study_dir / LOGS / name


def batch_logs(study_dir: Path, job_id: str) -> list[Path]:
    """What the batch script of a study's job said, before, beside and after the ranks."""
    return sorted((study_dir / LOGS).glob(f"*/{job_id}_*.out"))
