"""Jobs on a SLURM cluster, through submitit: one array for each shape of resources, split where the site says so.

What a job executes is a plain command with a path and an index, no pickle: it survives an upgrade of Python, and a
requeued job reads what it is to do from ROOT. submitit writes the batch file and calls sbatch. An array is written
down before it is submitted and carries a name of its own, so that whoever finds one without a job id can ask SLURM
whether it was submitted.

One call of sbatch, through submitit, which writes the batch file: what is asked for, in the profile's terms.

The batch file runs a line of shell of ours in place of submitit's pickle, and what the user's environment would add to
sbatch's options is kept from it.
"""

from __future__ import annotations

import contextlib
import shlex
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from harness.common.process import identify_process
from harness.dispatch.arrays import LOGS, Array, ArrayBook, Task, batch_logs
from harness.dispatch.base import Handle, Job
from harness.dispatch.slurm.queue import call, cluster_name, read_jobs, steering
from harness.dispatch.slurm.snapshot import running_from
from harness.plan.allocation import Shape
from harness.plan.cluster import Profile
from harness.record.jobs import JobState, SchedulerGone
from ssmttm.errors import InputError


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
            slurm_cluster=self._cluster,
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
        arrays = [array for array in self.book.read().values() if array.job_id and not array.is_void]
        views = (
            read_jobs([array.name for array in arrays], min(array.t for array in arrays)) if arrays else {}
        )
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

    @cached_property
    def _cluster(self) -> str | None:
        """The cluster that is submitted to; None where SLURM does not say it."""
        with contextlib.suppress(SchedulerGone):
            return cluster_name()
        return None

    def _sbatch(self, array: Array) -> str:
        """Hand an array to SLURM; returns its number."""
        shape = array.shape
        file = str(self.book.folder / f"{array.name}.json")
        command = [sys.executable, "-u", "-m", "harness.dispatch.slurm.job", file]
        if array.packed:  # in the shell's place, so that SLURM's signals find it
            command = ["exec", sys.executable, "-u", "-m", "harness.dispatch.ray.pilot", file]
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


def cancel_jobs(job_ids: Sequence[str]) -> None:
    """scancel these jobs and no others, which then save; those that are over already do not matter."""
    if job_ids:
        call("scancel", *job_ids)


@dataclass(frozen=True)
class Request:
    """What every element of an array asks for."""

    name: str
    elements: int
    nodes: int
    tasks_a_node: int
    cores_a_task: int
    gpus_a_node: int
    memory_gib: float
    """Memory a node, GiB."""
    hours: float
    """Time until it is to be told to save; what it needs for that comes on top."""
    tells_script: bool = False
    """Whether the batch script is told that its time is nearly over, and not the steps it started."""


def sbatch(request: Request, profile: Profile, folder: Path, line: str) -> str:
    """Submit an array that runs a line of shell and logs into `folder`; returns its number. Raises SchedulerGone."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError
    from submitit.slurm.slurm import SlurmExecutor

    class Executor(SlurmExecutor):  # type: ignore[misc]
        """Writes the batch file with our own command instead of a pickle's."""

        def submit_command(self, command: str, count: int) -> str:
            self.parameters["map_count"] = count
            return str(self._submit_command(command).job_id)

        def _make_submission_command(self, submission_file_path: Path) -> list[str]:
            command = super()._make_submission_command(submission_file_path)
            # What SBATCH_PARTITION and its like say goes before what the batch file asks for.
            return ["env", *(f"--unset={name}" for name in steering()), *command]

    folder.mkdir(parents=True, exist_ok=True)
    try:
        executor = Executor(folder)
        executor.update_parameters(**_parameters(request, profile))
        return executor.submit_command(line, request.elements)
    except (FailedSubmissionError, FailedJobError, RuntimeError, OSError) as error:
        lines = [text.strip() for text in str(error).splitlines() if "error:" in text]
        said = " ".join(lines) or str(error)
        if "MaxSubmit" in said:
            said += " (limits.jobs in the profile keeps a submission below that)"
        raise SchedulerGone(said) from error


def _parameters(request: Request, profile: Profile) -> dict[str, Any]:
    names = profile.partitions_for(request.nodes)
    if not names:
        raise InputError(f"{profile.name}: no partition takes a job of {request.nodes} nodes")
    hours = min(profile.hours_in(names), request.hours + profile.signal_seconds / 3600)
    gpus: dict[str, Any] = {}
    if profile.gpus:
        kind = f"{profile.gpu_type}:" if profile.gpu_type else ""
        gpus = {"gpus_per_node": f"{kind}{request.gpus_a_node}"}
    asked = {
        "account": profile.account,
        "qos": profile.qos_in(names),
        "constraint": profile.constraint,
        "exclude": profile.exclude,
    }
    return {
        "job_name": request.name,
        "partition": ",".join(names),
        "time": max(1, round(60 * hours)),
        "nodes": request.nodes,
        "ntasks_per_node": request.tasks_a_node,
        "cpus_per_task": request.cores_a_task,
        "mem": f"{max(1, round(1024 * request.memory_gib))}MB",
        "signal_delay_s": profile.signal_seconds,
        "array_parallelism": profile.limits.parallel or request.elements,
        "setup": list(profile.setup),
        "stderr_to_stdout": True,
        "wckey": None,  # submitit's own is refused where the site checks them
        "use_srun": False,  # our own command starts the ranks, and outlives them
        "additional_parameters": {
            "requeue": True,
            "open_mode": "append",  # what a job said before it was requeued is wanted too
            **({"signal": f"B:USR2@{profile.signal_seconds}"} if request.tells_script else {}),
            **({"reservation": profile.reservation} if profile.reservation else {}),
        },
        **gpus,
        **{key: value for key, value in asked.items() if value is not None},
    }
