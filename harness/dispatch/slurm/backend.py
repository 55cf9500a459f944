"""Tasks on a SLURM cluster: one array for each shape of resources, split at the site's limit.

A job executes a plain command with a path and an index, no pickle: it survives an upgrade of Python, and a requeued job
reads its task from ROOT. An array is recorded under a unique name before it is submitted, so that the ledger can ask
SLURM for it if the submission was cut short.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import shlex
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from harness.common.disk import make_folder
from harness.common.process import interpreter
from harness.dispatch.arrays import LOGS, Array, ArrayStore, batch_logs, new_array, new_name
from harness.dispatch.base import Backend, Handle, SubmitTarget, Task
from harness.dispatch.slurm.job import RANKS_MARK, SETUP_ENDED, START_MARK
from harness.dispatch.slurm.queue import call, cluster_name, read_jobs, steering, unavailable
from harness.dispatch.slurm.snapshot import check_copying, copy_code, running_from
from harness.plan.allocation import Shape, describe_shares
from harness.plan.cluster import Cluster, Profile
from harness.plan.plan import PlannedRun
from harness.record.control import Control
from harness.record.jobs import JobView, SchedulerUnavailable
from harness.record.nodes import NODE_FAILURES, BadNode, bad_nodes_in
from harness.record.provenance import record_code
from ssmttm.errors import InputError


class SlurmBackend(Backend):
    """Runs each task as an element of an array of SLURM jobs."""

    name, scheduler, outlives = "slurm", "SLURM", True

    def __init__(self, study_dir: Path, target: SubmitTarget, jobs: int | None = None) -> None:
        super().__init__(study_dir, target, jobs)
        self.store = ArrayStore(self.study_dir)
        self.copy: Path | None = None
        """Copy of the code from which the jobs run; None if they run the installed code."""

    def __enter__(self) -> Self:
        """Copy the code if the profile has jobs run from a copy."""
        if "%" in str(self.study_dir):
            raise InputError(
                f"--root: {self.study_dir}: SLURM reads % in a log's path as a pattern; choose another path"
            )
        if self.profile.snapshot and self.copy is None:
            self.copy = copy_code(self.study_dir, record_code(self.study_dir))
        return self

    @property
    def profile(self) -> Profile:
        """The cluster's profile."""
        assert self.target.profile is not None
        return self.target.profile

    def check(self, places: Mapping[str, Path]) -> None:
        """Raise InputError for an unknown partition, a path that is not shared, or code that cannot be copied."""
        profile = self.profile
        for option, path in places.items():
            profile.check_shared(option, path)
        profile.check_container(places)
        if profile.snapshot:
            check_copying(self.study_dir)
        known = set(call("sinfo", "--noheader", "--format=%R").split())
        for name in profile.partitions:
            if name not in known:
                raise InputError(
                    f"--cluster {profile.name}: partitions: {name}: SLURM here has {', '.join(sorted(known))}"
                )

        bad = self._bad_nodes()
        names = ",".join(profile.partitions)
        of_nodes = ("sinfo", "--noheader", "--Node", f"--partition={names}", "--format=%N")
        if bad and set(call(*of_nodes).split()) <= set(bad):
            root = places.get("--root")
            remedy = "" if root is None else f" --root {shlex.quote(str(root))}"
            raise InputError(
                f"--cluster {profile.name}: every node of {names} has failed under this study: "
                f"{'; '.join(map(str, bad.values()))}; once one is repaired: ssmscale doctor{remedy} --forget-node NODE"
            )

    def offer(self, places: Mapping[str, Path]) -> Cluster:
        """Return the profile's cluster."""
        return self.profile.cluster()

    def describe(self, runs: Sequence[PlannedRun]) -> list[str]:
        """Describe which planned Runs are packed; raises InputError if a Series does not fit."""
        return describe_shares(runs, self.profile, self.target.on, self.target.nodes)

    def count_at_once(self, series: int) -> int | None:
        """Return the number of jobs that the profile's `limits` let run at once."""
        limits = [
            most for most in (self.profile.limits.parallel, self.profile.limits.jobs) if most is not None
        ]
        return min([series, *limits])

    def count_admitted(self, tasks: int) -> int:
        """Return how many of this number of tasks the user may submit under the profile's `limits.jobs`."""
        most = self.profile.limits.jobs
        if most is None:
            return tasks
        there = call("squeue", "--noheader", "--array", f"--user={getpass.getuser()}", "--format=%i")
        return max(0, min(tasks, most - len(there.split())))

    def batches(self, tasks: Sequence[Task]) -> list[list[Task]]:
        """Divide tasks by shape, in the order of each shape's first task, and split at the site's limit."""
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
        """End these jobs by scancel."""
        if handles:
            call("scancel", *(handle.job_id for handle in handles))

    def logs(self, handle: Handle) -> list[Path]:
        """Return the logs of the batch script."""
        return batch_logs(self.study_dir, handle.job_id)

    def cluster_name(self) -> str | None:
        """Return the name of the cluster whose SLURM programs run here."""
        return cluster_name()

    def _shape(self, task: Task) -> Shape:
        """Return the resources of a job, with its ranks' share of each node's memory."""
        profile, a_node = self.profile, task.ranks // task.nodes
        most = (profile.gpus if task.on_gpu else 0) or max(1, profile.cores // task.threads)
        memory = round(profile.memory_gib * min(1.0, a_node / most), 2)
        return Shape(nodes=task.nodes, ranks=task.ranks, threads=task.threads, memory_gib=max(0.5, memory))

    def _hours(self, tasks: Sequence[Task]) -> float:
        """Return the longest task's upper estimate plus a quarter of an hour, within the profile's limit."""
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
        """Submit tasks as an array of this name; if packed, as one job of this shape on this kind of device."""
        array = new_array(
            name,
            shape,
            tasks,
            packed=packed,
            device=device,
            container=self.profile.container_of_jobs,
            copy_of_code=self.copy.name if self.copy else None,
            slurm_cluster=self._cluster,
        )
        return self.store.submit(array, lambda written: self._sbatch(written, hours))

    @cached_property
    def _cluster(self) -> str | None:
        """SLURM's name of this cluster; None if SLURM does not tell it."""
        with contextlib.suppress(SchedulerUnavailable):
            return cluster_name()
        return None

    def _sbatch(self, array: Array, hours: float) -> str:
        """Submit an array whose jobs have `hours` until they are told to save; returns its number."""
        file = str(self.store.path_of(array))
        module = "harness.dispatch.ray.pilot" if array.packed else "harness.dispatch.slurm.job"
        # In the shell's place, SLURM's signals reach the pilot.
        line = self._line(module, file, array.digest, takes_over=array.packed)
        return sbatch(
            line, array.elements, self.study_dir / LOGS / array.name, self._parameters(array, hours)
        )

    def _bad_nodes(self) -> dict[str, BadNode]:
        """Return the nodes that the study avoids."""
        return bad_nodes_in(Control(self.study_dir / "control.jsonl").read())

    def _line(self, module: str, *arguments: str, takes_over: bool = False) -> str:
        """Return the shell line of a job that runs a module; with `takes_over` in the shell's place."""
        command = [*(["exec"] if takes_over else []), *interpreter("-u", "-m", module, *arguments)]
        return running_from(self.copy, command) if self.copy else shlex.join(command)

    def _setup(self, array: Array) -> list[str]:
        """Return the lines of the batch script before the command: the profile's, and what notes their end.

        If a line ends the script, the job is requeued elsewhere if the line blames the node.
        """
        file = str(self.store.path_of(array))
        ended = self._line("harness.dispatch.slurm.job", SETUP_ENDED, file, array.digest)
        on_end = f'test -n "$SSMSCALE_SET_UP" || {ended}'
        own = self.profile.node_failures
        return [
            f'echo "{START_MARK} ${{SLURM_RESTART_COUNT:-0}} on $SLURMD_NODENAME"',
            *([f"export {NODE_FAILURES}={shlex.quote(json.dumps(own))}"] if own else []),
            f"trap {shlex.quote(on_end)} EXIT",
            *self.profile.setup,
            "SSMSCALE_SET_UP=1",
            f'echo "{RANKS_MARK}"',
        ]

    def _parameters(self, array: Array, hours: float) -> dict[str, Any]:
        profile, shape = self.profile, array.shape
        names = profile.partitions_for(shape.nodes)
        if not names:
            raise InputError(f"{profile.name}: no partition takes a job of {shape.nodes} nodes")
        hours = min(profile.hours_in(names), hours + profile.signal_seconds / 3600)
        avoided = [*([profile.exclude] if profile.exclude else []), *self._bad_nodes()]
        optional = {
            "account": profile.account,
            "qos": profile.qos_in(names),
            "constraint": profile.constraint,
            "exclude": ",".join(dict.fromkeys(avoided)) or None,
            "dependency": f"afterany:{':'.join(array.after)}" if array.after else None,
        }
        if profile.gpus and any(task.on_gpu for task in array.tasks):
            kind = f"{profile.gpu_type}:" if profile.gpu_type else ""
            optional["gpus_per_node"] = f"{kind}{shape.ranks_a_node}"
        return {
            "job_name": array.name,
            "partition": ",".join(names),
            "time": max(1, round(60 * hours)),
            "nodes": shape.nodes,
            "ntasks_per_node": 1 if array.packed else shape.ranks_a_node,
            "cpus_per_task": shape.threads * (shape.ranks_a_node if array.packed else 1),
            "mem": f"{max(1, round(1024 * shape.memory_gib))}MB",
            "signal_delay_s": profile.signal_seconds,
            "array_parallelism": profile.limits.parallel or array.elements,
            "setup": self._setup(array),
            "stderr_to_stdout": True,
            "wckey": None,  # sites that check the key refuse submitit's
            "use_srun": False,  # the harness's command starts the ranks, and outlives them
            "additional_parameters": {
                "requeue": True,
                "open_mode": "append",  # keeps the log of the job's former starts
                # The pilot needs the signal too: while it restarts Ray, the job has no step that SLURM could signal.
                **({"signal": f"B:USR2@{profile.signal_seconds}"} if array.packed else {}),
                **({"reservation": profile.reservation} if profile.reservation else {}),
            },
            **{key: value for key, value in optional.items() if value is not None},
        }


def sbatch(line: str, elements: int, folder: Path, parameters: Mapping[str, Any]) -> str:
    """Submit an array that runs a shell line and logs into `folder`; returns its number.

    `parameters` are those of submitit's SlurmExecutor.
    """
    from submitit.core.utils import FailedJobError, FailedSubmissionError
    from submitit.slurm.slurm import SlurmExecutor

    class Executor(SlurmExecutor):  # type: ignore[misc]
        """Writes the batch file with the harness's command instead of a pickle's."""

        def submit_command(self, command: str, count: int) -> str:
            self.parameters["map_count"] = count
            return str(self._submit_command(command).job_id)

        def _make_submission_command(self, submission_file_path: Path) -> list[str]:
            command = super()._make_submission_command(submission_file_path)
            # sbatch prefers variables such as SBATCH_PARTITION to the options in the batch file.
            return ["env", *(f"--unset={name}" for name in steering()), *command]

    make_folder(folder)
    try:
        executor = Executor(folder)
        executor.update_parameters(**parameters)
        return executor.submit_command(line, elements)
    except (FailedSubmissionError, FailedJobError, RuntimeError, OSError) as error:
        lines = [text.strip() for text in str(error).splitlines() if "error:" in text]
        said = " ".join(lines) or str(error)
        if "MaxSubmit" in said:
            said += " (set limits.jobs in the profile to stay below that)"
        raise unavailable(said) from error
