"""One call of sbatch, through submitit, which writes the batch file: what is asked for, in the profile's terms.

The batch file runs a line of shell of ours in place of submitit's pickle, and what the user's environment would add to
sbatch's options is kept from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.dispatch.slurm.queue import steering, unavailable
from harness.plan.cluster import Profile
from ssmttm.errors import InputError


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
