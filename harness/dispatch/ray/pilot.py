"""The command of a packed array's batch script: run a Ray on the nodes of one SLURM job, and a controller on it.

    python -m harness.dispatch.ray.pilot ARRAY_FILE DIGEST      inside the array's only job

srun starts an agent on each node (harness.dispatch.ray.node_agent), which starts Ray. The controller
(harness.dispatch.ray.controller), a child of this process, trains the tasks. A controller that dies is started again,
and so is Ray if its head ends, until that has happened several times without progress. When the job is told to end, the
controller has all workers save; a job whose time is over is requeued under its own number if Runs are left.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from harness.common.process import interpreter, last_line, start_logged, stop_when_parent_ends
from harness.dispatch.arrays import Array, packed_folder
from harness.dispatch.ray.cluster import DATA_STORE_BYTES, NodePlan, RayNodes, agent_command, make_token
from harness.dispatch.ray.host import RayDown
from harness.dispatch.slurm.queue import environment_of_srun
from harness.dispatch.slurm.settle import OUT_OF_TIME, Ending, JobStart, job_number, patiently, run_job
from harness.dispatch.worker_process import GRACE_SECONDS
from harness.plan.container import PYXIS, contained
from harness.record.control import Control
from harness.record.root import Root
from harness.train.stopping import (
    EXIT_BAD_NODE,
    EXIT_NO_NODES,
    EXIT_NO_SPACE,
    EXIT_PREEMPTED,
    MOST_ATTEMPTS,
    STOP_SIGNALS,
)

log = logging.getLogger("ssmscale.ray")

CONTROLLER = ("-m", "harness.dispatch.ray.controller")
LISTEN_SECONDS = 0.5
NEWS_SECONDS = 3.0
"""Time to wait for news of the head's end after a controller has died: it dies with the head, and is noticed first."""
END_SECONDS = GRACE_SECONDS + 15.0
"""Time that a controller has to end: its job must be requeued before its time is over."""


def main(arguments: Sequence[str] | None = None, controller: Sequence[str] = CONTROLLER) -> int:
    """Train a packed array inside its job; returns the job's exit status."""

    def train(array_file: Path, array: Array) -> int:
        pilot = Pilot(array_file, array, controller)
        for number in (*STOP_SIGNALS, signal.SIGCONT):
            signal.signal(number, pilot.on_signal)
        return pilot.run()

    return run_job(arguments, train)


@dataclass
class Pilot:
    """One start of a packed array's job."""

    array_file: Path
    array: Array
    controller: Sequence[str]
    told: list[str] = field(default_factory=list)
    """Names of the signals that told this job to end, in order."""

    def __post_init__(self) -> None:
        study_dir = self.array_file.parent.parent
        root, self.control = Root(study_dir.parent.parent), Control(study_dir / "control.jsonl")
        self.start = JobStart(
            job_number(), root, self.control, self.array.tasks, is_packed=True, array=self.array.name
        )
        self.folder = packed_folder(study_dir, self.array.name)
        self.log = self.folder / "controller.log"

    def on_signal(self, number: int, _frame: object) -> None:
        """Remember a signal instead of ending: this process must outlive the workers that save."""
        name = signal.Signals(number).name
        log.info("%s", name)
        if number in STOP_SIGNALS:
            self.told.append(name)

    def run(self) -> int:
        """Train the unfinished Runs; returns the job's exit status."""
        before, code = self.start.place(), 0
        while not self.told and self.start.unfinished():
            retries = self._count_retries()
            try:
                with self._ray() as nodes:
                    code = self._train(nodes)
                if code or self._count_retries() == retries:
                    break  # else a Run was retried, which the controller may not have seen before it ended
            except RayDown as down:
                if not self.told and not self._may_start_again(str(down)):
                    break
        return self.settle(code, before)

    def settle(self, code: int, before: str) -> int:
        """Requeue the job whose controller ended with `code`, or let it end; returns the job's exit status."""
        if code == EXIT_NO_SPACE:
            ending = Ending.DISK_FULL
        elif code == EXIT_BAD_NODE and not self.told:
            ending = Ending.BAD_NODE
        else:
            ending = Ending.OUT_OF_TIME if self.told else Ending.OTHERS_TRAIN
        return self.start.settle(ending, before, lambda _: self._may_start_again(OUT_OF_TIME))

    def _count_retries(self) -> int:
        return sum(event["event"] == "retried" for event in self.control.read())

    def _may_start_again(self, reason: str) -> bool:
        log.error("%s", reason)
        return self.start.may_start_again(
            reason, f"stopped {MOST_ATTEMPTS} times at the same place: {reason}"
        )

    @contextmanager
    def _ray(self) -> Iterator[RayNodes]:
        """Run a Ray on all nodes of the job during the block; raises RayDown if it does not start."""
        plan = self._plan()
        # The agents report signals: some, such as those of scancel, reach a job's steps and not its batch script.
        command = self._contained(self._srun(self.array.shape.nodes), agent_command(plan))
        nodes = RayNodes(command, plan, environment_of_srun(), self.told)
        with nodes.running() as address:
            if (line := address.tunnel()) is not None:
                log.info(
                    "dashboard: %s, then %s with the token in %s", line, address.dashboard, plan.token_file
                )
            yield nodes

    def _train(self, nodes: RayNodes) -> int:
        """Run a controller on a Ray, and another if it dies; returns the last one's exit status.

        Raises RayDown if Ray ends.
        """
        while True:
            code = self._run_controller(nodes)
            if self.told or code in {0, EXIT_BAD_NODE, EXIT_NO_SPACE, EXIT_PREEMPTED}:
                return code
            nodes.listen(NEWS_SECONDS)
            nodes.check()
            if code == EXIT_NO_NODES:
                raise RayDown(last_line(self.log))
            reason = f"its controller ended with status {code}; its log ends: {last_line(self.log)}"
            if not self._may_start_again(reason):
                return code

    def _run_controller(self, nodes: RayNodes) -> int:
        """Run a controller, and pass on the first signal of this job; returns its exit status."""
        assert nodes.address is not None
        container = self.array.container
        by_srun = container is not None and container.runtime == PYXIS
        launcher = [*self._srun(1), f"--nodelist={os.environ['SLURMD_NODENAME']}"] if by_srun else []
        command = interpreter("-u", *self.controller, str(self.array_file), self.array.digest)
        process = start_logged(
            self._contained(launcher, command),
            self.log,
            env=environment_of_srun(**nodes.address.environment()),
            preexec_fn=stop_when_parent_ends,  # this process has one thread
        )
        deadline: float | None = None
        try:
            while process.poll() is None:
                nodes.listen(LISTEN_SECONDS)
                if not self.told:
                    nodes.check()
                elif deadline is None:
                    deadline = time.monotonic() + END_SECONDS
                    process.send_signal(signal.Signals[self.told[0]])
                elif time.monotonic() > deadline:
                    log.error(
                        "its controller does not end and is killed; its log ends: %s", last_line(self.log)
                    )
                    process.kill()
                    process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE_SECONDS)
                process.kill()
                process.wait()
        return process.returncode

    def _plan(self) -> NodePlan:
        shape = self.array.shape
        said = patiently("scontrol", "--oneliner", "show", "node", os.environ["SLURM_JOB_NODELIST"])
        nodes = re.findall(r"^NodeName=(\S+).*?\bNodeAddr=(\S+)", said, flags=re.MULTILINE)
        has_gpus = any(
            os.environ.get(name) for name in ("SLURM_GPUS_ON_NODE", "SLURM_JOB_GPUS", "SLURM_GPUS_PER_NODE")
        )
        drives = any(task.drives_ray for task in self.array.tasks)
        return NodePlan(
            token_file=make_token(self.folder),
            log_dir=self.folder,
            nodes=dict(nodes),
            cpus=shape.ranks_a_node * shape.threads,
            gpus=shape.ranks_a_node if has_gpus else 0,
            **({"object_store_bytes": DATA_STORE_BYTES} if drives else {}),
        )

    def _contained(self, launcher: Sequence[str], command: Sequence[str]) -> list[str]:
        """Return the command line by which a launcher starts a command, in the array's container if it has one."""
        tasks = {path: None for task in self.array.tasks for path in task.paths}
        return contained(self.array.container, launcher, command, [*tasks, self.folder.parents[2]])

    def _srun(self, nodes: int) -> list[str]:
        """Return an srun command for one task with all cores of each node, shared with other steps of the job."""
        shape = self.array.shape
        return [
            "srun",
            "--overlap",
            "--wait=0",
            f"--nodes={nodes}",
            f"--ntasks={nodes}",
            "--ntasks-per-node=1",
            f"--cpus-per-task={shape.ranks_a_node * shape.threads}",
            "--export=ALL",
        ]


if __name__ == "__main__":
    sys.exit(main())
