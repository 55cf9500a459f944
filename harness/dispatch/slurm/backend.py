"""Tasks on a SLURM cluster: one array for each shape of resources, split where the site says so.

What a job executes is a plain command with a path and an index, no pickle: it survives an upgrade of Python, and a
requeued job reads what it is to do from ROOT. An array is written down before it is submitted and carries a name of its
own, so that SLURM can be asked whether one without a job id was submitted.
"""

from __future__ import annotations

import contextlib
import getpass
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from harness.dispatch.arrays import LOGS, Array, ArrayStore, batch_logs, new_array, new_name
from harness.dispatch.base import Backend, Handle, SubmitTarget, Task
from harness.dispatch.slurm.queue import call, cluster_name, read_jobs, steering, unavailable
from harness.dispatch.slurm.snapshot import check_copying, copy_code, running_from
from harness.plan.allocation import Shape, describe_shares
from harness.plan.cluster import Cluster, Profile
from harness.plan.plan import PlannedRun
from harness.record.jobs import JobView, SchedulerUnavailable
from harness.record.provenance import record_code
from harness.record.registry import ResolvedStudy
from ssmttm.errors import InputError


class SlurmBackend(Backend):
    """Each task an element of an array of SLURM jobs, all of which outlive the process that submits."""

    name, scheduler, outlives = "slurm", "SLURM", True

    def __init__(self, study_dir: Path, target: SubmitTarget, jobs: int | None = None) -> None:
        super().__init__(study_dir, target, jobs)
        self.store = ArrayStore(self.study_dir)
        self.copy: Path | None = None
        """A copy of the code that jobs are to run from."""

    def __enter__(self) -> Self:
        """Copy the code where the profile has jobs run from a copy."""
        if "%" in str(self.study_dir):
            raise InputError(
                f"--root: {self.study_dir}: SLURM reads % in a log's path as a pattern; choose another"
            )
        if self.profile.snapshot and self.copy is None:
            self.copy = copy_code(self.study_dir, record_code(self.study_dir))
        return self

    @property
    def profile(self) -> Profile:
        """The cluster's profile."""
        assert self.target.profile is not None
        return self.target.profile

    def check(self, resolved: ResolvedStudy) -> None:
        """Raise InputError where the profile names a partition SLURM has not, or nodes cannot see ROOT or the corpus.

        Also where the code is to be copied and cannot be.
        """
        profile = self.profile
        profile.check_shared("--root", resolved.root.path)
        profile.check_shared("corpus.path", resolved.study.corpus.path)
        if profile.snapshot:
            check_copying(self.study_dir)
        known = set(call("sinfo", "--noheader", "--format=%R").split())
        for name in profile.partitions:
            if name not in known:
                raise InputError(
                    f"--cluster {profile.name}: partitions: {name}: SLURM here has {', '.join(sorted(known))}"
                )

    def offer(self, resolved: ResolvedStudy) -> Cluster:
        """Return the profile's cluster."""
        return self.profile.cluster()

    def describe(self, runs: Sequence[PlannedRun]) -> list[str]:
        """Say what of planned Runs is packed and what is not; raises what `choose_allocation` raises."""
        return describe_shares(runs, self.profile, self.target.on, self.target.nodes)

    def room(self, tasks: int) -> int:
        """Return how many of so many tasks this user may submit now."""
        most = self.profile.limits.jobs
        if most is None:
            return tasks
        there = call("squeue", "--noheader", "--array", f"--user={getpass.getuser()}", "--format=%i")
        return max(0, min(tasks, most - len(there.split())))

    def batches(self, tasks: Sequence[Task]) -> list[list[Task]]:
        """Divide tasks by shape in the order of their first, each shape split at the site's limit."""
        by_shape: dict[Shape, list[Task]] = {}
        for task in tasks:
            by_shape.setdefault(self._shape(task), []).append(task)
        most = self.profile.limits.array_size
        return [
            members[first : first + most]
            for members in by_shape.values()
            for first in range(0, len(members), most)
        ]

    def submit(self, tasks: Sequence[Task], name: str = "") -> list[Handle]:
        """Submit tasks of one shape as an array."""
        return self.submit_array(name or new_name(), tasks, self._shape(tasks[0]), self._hours(tasks))

    def views(self, handles: Sequence[Handle]) -> Mapping[str, JobView]:
        """Ask squeue and sacct once for all arrays."""
        names = list(dict.fromkeys(handle.batch for handle in handles))
        return read_jobs(names, min((handle.t for handle in handles), default=0.0))

    def cancel(self, handles: Sequence[Handle]) -> None:
        """End these jobs and no others by scancel."""
        if handles:
            call("scancel", *(handle.job_id for handle in handles))

    def logs(self, handle: Handle) -> list[Path]:
        """Return the logs of the batch script."""
        return batch_logs(self.study_dir, handle.job_id)

    def cluster_name(self) -> str | None:
        """Return SLURM's name of the cluster that its programs speak to here."""
        return cluster_name()

    def _shape(self, task: Task) -> Shape:
        """Return the resources of a job: its ranks' share of each node's memory."""
        profile, a_node = self.profile, task.ranks // task.nodes
        most = profile.gpus or max(1, profile.cores // task.threads)
        memory = round(profile.memory_gib * min(1.0, a_node / most), 2)
        return Shape(nodes=task.nodes, ranks=task.ranks, threads=task.threads, memory_gib=max(0.5, memory))

    def _hours(self, tasks: Sequence[Task]) -> float:
        """Return the most that the longest task may take and a quarter of an hour, within the profile's limit."""
        longest = max((task.hours.high for task in tasks), default=0.0)
        return min(self.profile.limits.hours, longest + 0.25)

    def submit_array(
        self,
        name: str,
        tasks: Sequence[Task],
        shape: Shape,
        hours: float,
        *,
        packed: bool = False,
        device: str = "GPU",
    ) -> list[Handle]:
        """Submit tasks under that name; packed, one job of that shape runs all of them on such devices."""
        array = new_array(
            name,
            shape,
            tasks,
            packed=packed,
            device=device,
            copy_of_code=self.copy.name if self.copy else None,
            slurm_cluster=self._cluster,
        )
        return self.store.submit(array, lambda written: self._sbatch(written, hours))

    @cached_property
    def _cluster(self) -> str | None:
        """The cluster that is submitted to; None where SLURM does not say it."""
        with contextlib.suppress(SchedulerUnavailable):
            return cluster_name()
        return None

    def _sbatch(self, array: Array, hours: float) -> str:
        """Hand an array to SLURM; returns its number."""
        shape, file = array.shape, str(self.store.path_of(array))
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
            hours=hours,
            tells_script=array.packed,  # which is there too while Ray, its only step, is being started again
        )
        return sbatch(request, self.profile, self.study_dir / LOGS / array.name, line)


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
    """Submit an array that runs a line of shell and logs into `folder`; returns its number."""
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
        raise unavailable(said) from error


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
