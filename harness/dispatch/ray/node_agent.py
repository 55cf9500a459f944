"""The agent of one Ray node: it starts Ray's processes, replaces a raylet that dies, and ends all of them.

    python -m harness.dispatch.ray.node_agent PLAN     PLAN is a cluster.NodePlan as JSON; run by srun or directly

The agent reads the head's address from standard input and ends when that input ends; it reports events of the node on
standard output. The head runs no tasks: drivers depend on it, so a raylet that dies affects only its own workers. SLURM
signals every process of a step: the agent reports the signal, Ray's processes ignore the one sent before a time limit,
and workers that outlive their raylet have time to save.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from harness.common.process import (
    SAFE_PATH,
    PipeReader,
    adopt_orphans,
    describe_end,
    interpreter,
    log_to_stderr,
    start_logged,
    stop_when_parent_ends,
)
from harness.dispatch.ray.cluster import NodeEvent, NodePlan, environment_of_ray
from harness.dispatch.ray.host import (
    LOOPBACK,
    RayDown,
    address_towards,
    free_ports,
    offered_gpus,
    temporary_folder,
)
from harness.dispatch.ray.start_hook import NO_DASHBOARD, NODE_ADDRESS
from harness.dispatch.worker_process import GRACE_SECONDS
from harness.train.stopping import MOST_ATTEMPTS

log = logging.getLogger("ssmscale.ray")

STEADY_SECONDS = 60.0
"""Age at which a raylet counts as started: its death does not count as a failed start."""
REAP_SECONDS = 10.0
POLL_SECONDS = 0.2


class NodeAgent:
    """Ray's processes on this node."""

    def __init__(self, plan: NodePlan) -> None:
        self.plan = plan
        self.name = name_in(plan)
        self.is_first = len(plan.nodes) == 1 or os.environ["SLURM_NODEID"] == "0"
        self.ip = address_towards([place for name, place in plan.nodes.items() if name != self.name])
        self.devices = offered_gpus(os.environ, plan.gpus)
        self.folder = temporary_folder(os.environ)
        self.log_file = plan.log_dir / f"ray-{self.name}.log"
        self.head: RayProcess | None = None
        self.worker: RayProcess | None = None
        self.is_announced = False
        """True once the head's address has been reported."""
        self.is_up = False
        """True once this node has been reported as up."""
        self.is_ending = False
        """True if SLURM is ending the step, so that processes that end are not replaced."""
        self._join: str | None = None
        self._input = PipeReader(0)
        self._failures = 0
        self._starts = 0
        self._reaped = 0.0

    def run(self) -> None:
        """Keep the node running until standard input ends; raises RayDown if it fails for good."""
        for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
            signal.signal(number, self._report_signal)
        if self.is_first:
            self.head = self._start_head()
        while True:
            for line in self._input.read(POLL_SECONDS):
                self._join = json.loads(line)["join"]
            if self._input.is_ended:
                return
            if (
                time.monotonic() - self._reaped > REAP_SECONDS
            ):  # seldom: it goes through all processes of the machine
                self._reaped = time.monotonic()
                reap(self.processes)
            if self.head is not None:
                self._keep_head(self.head)
            if self._join is not None:
                self._keep_worker(self._join)

    @property
    def processes(self) -> list[RayProcess]:
        """The processes of the worker and of the head that were started."""
        return [process for process in (self.worker, self.head) if process is not None]

    def end(self) -> None:
        """End Ray, wait for workers that save, and remove its folder."""
        for process in self.processes:
            process.end()
        self._clear(keep=None)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _keep_head(self, head: RayProcess) -> None:
        if head.is_gone:
            if self.is_ending:
                return
            if self.is_announced:
                head.keep_logs(self.plan.log_dir / f"ray-{self.name}-head")
                raise RayDown(f"its head ended; {describe_end(self.log_file)}")
            head.end()
            self._count_failure(head)
            self.head = self._start_head()
        elif not self.is_announced and (address := head.address) is not None:
            self.is_announced = True
            dashboard = None
            if self.plan.dashboard and not (head.folder / NO_DASHBOARD).exists():
                dashboard = f"http://{LOOPBACK}:{self._dashboard_port}"
            report(self.plan, "head", address=address, dashboard=dashboard, temp_dir=head.folder)

    def _keep_worker(self, address: str) -> None:
        worker = self.worker
        if worker is None:
            self.worker = self._start_worker(address)
        elif worker.is_gone:
            if self.is_ending:
                return
            if self.is_up:
                self.is_up = False
                report(self.plan, "down", reason=f"its raylet ended; {describe_end(self.log_file)}")
            if time.monotonic() - worker.began > STEADY_SECONDS:
                self._failures = 0
            worker.end()
            self._count_failure(worker)
            self._clear(keep=self.head)  # its successor gives the devices to other workers
            self.worker = self._start_worker(address)
        elif not self.is_up and worker.address is not None:
            self.is_up = True
            report(self.plan, "up")

    def _start_head(self) -> RayProcess:
        (self._dashboard_port,) = free_ports(1, LOOPBACK)
        arguments = [
            "--head",
            "--port=0",
            f"--node-name={self.name}-head",
            "--num-cpus=0",
            "--num-gpus=0",
            f"--include-dashboard={str(self.plan.dashboard).lower()}",
            f"--dashboard-host={LOOPBACK}",
            f"--dashboard-port={self._dashboard_port}",
            "--no-monitor",  # nothing is scaled
        ]
        return self._start("head", arguments, devices=[])

    def _start_worker(self, address: str) -> RayProcess:
        arguments = [
            f"--address={address}",
            f"--node-name={self.name}",
            f"--num-cpus={self.plan.cpus}",
            f"--num-gpus={self.plan.gpus}",
        ]
        return self._start("worker", arguments, self.devices)

    def _start(self, role: str, arguments: Sequence[str], devices: Sequence[str] | None) -> RayProcess:
        # With port 0 the kernel assigns a free port, which the process reports to the others. A raylet does not wait
        # long for its agents' reports (see harness.dispatch.ray.start_hook), so their ports are chosen here.
        own = ("node-manager-port", "object-manager-port", "min-worker-port", "max-worker-port")
        slow = (
            "dashboard-agent-listen-port",
            "dashboard-agent-grpc-port",
            "runtime-env-agent-port",
            "metrics-export-port",
        )
        chosen = zip(slow, free_ports(len(slow), self.ip), strict=True)
        common = [
            "--block",
            *(f"--{name}=0" for name in own),
            *(f"--{name}={port}" for name, port in chosen),
            f"--object-store-memory={self.plan.object_store_bytes}",
            "--include-log-monitor=false",
            "--disable-usage-stats",
        ]
        self._starts += 1
        folder = self.folder / f"{role}-{self._starts}"
        return RayProcess([*arguments, *common], folder, self.log_file, self._environment(devices))

    def _environment(self, devices: Sequence[str] | None) -> dict[str, str]:
        own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        if devices is not None:
            own["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        return {
            **own,
            **environment_of_ray(self.ip, self.plan.token_file),
            **SAFE_PATH,
            "RAY_START_HOOK": "harness.dispatch.ray.start_hook.adjust",
            NODE_ADDRESS: self.ip,
            # When a Ray worker ends, its children, the ranks, save and end by themselves.
            "RAY_kill_child_processes_on_worker_exit": "0",
            "RAY_worker_niceness": "0",  # by default Ray gives its workers a lower priority than all other processes
            # Ray would kill workers for memory that others on the node use; SLURM limits the job's memory.
            "RAY_memory_monitor_refresh_ms": "0",
            # Ray notices a killed raylet after 5 s instead of 15.
            "RAY_health_check_period_ms": "1000",
            # On a busy machine agents, workers and the dashboard take long to make their imports.
            "RAY_agent_register_timeout_ms": "300000",
            "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "300",
            "RAY_DASHBOARD_SUBPROCESS_MODULE_WAIT_READY_TIMEOUT": "300",
            "RAY_worker_register_timeout_seconds": "300",
            "DASHBOARD_METRIC_PORT": "0",  # the dashboard's own metrics listen at a fixed port otherwise
        }

    def _count_failure(self, process: RayProcess) -> None:
        self._failures += 1
        process.keep_logs(self.plan.log_dir / f"ray-{self.name}-{self._starts}")
        if self._failures >= MOST_ATTEMPTS:
            raise RayDown(f"ended {self._failures} times in a row; {describe_end(self.log_file)}")

    def _clear(self, keep: RayProcess | None) -> None:
        """Wait for the workers of a raylet that has ended to save, and kill its other processes."""
        kept = {keep.process.pid, *(child.pid for child in below(keep.process.pid))} if keep else set()
        left = [process for process in below(os.getpid()) if process.pid not in kept]
        ours = [process for process in left if is_ours(process)]
        spared = {one.pid for process in ours for one in (process, *below(process.pid))}
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.pid not in spared:
                    process.kill()
                # The mirror, harness.tracking.live, ends with its worker.
                elif process in ours and "harness.tracking.live" not in process.cmdline():
                    process.terminate()
        psutil.wait_procs(ours, timeout=GRACE_SECONDS)
        for process in below(os.getpid()):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.pid not in kept:
                    process.kill()
        reap(self.processes)

    def _report_signal(self, number: int, _frame: object) -> None:
        self.is_ending = self.is_ending or number == signal.SIGTERM
        report(self.plan, "signal", reason=signal.Signals(number).name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run this host's node of a plan; returns the exit status."""
    log_to_stderr()
    (text,) = arguments if arguments is not None else sys.argv[1:]
    plan = NodePlan.model_validate_json(text)
    adopt_orphans()  # so that this process can end what Ray's processes leave behind
    agent = None
    try:
        agent = NodeAgent(plan)
        agent.run()
    except RayDown as down:
        report(plan, "failed", reason=str(down))
        return 1
    finally:
        if agent is not None:
            agent.end()
    return 0


def report(plan: NodePlan, event: str, **facts: Any) -> None:
    """Print a NodeEvent of this node."""
    found = NodeEvent.model_validate({"node": name_in(plan), "event": event, **facts})
    with contextlib.suppress(BrokenPipeError):  # the reader has ended, and standard input ends too
        os.write(1, found.model_dump_json(exclude_none=True).encode() + b"\n")


def name_in(plan: NodePlan) -> str:
    """Return this node's name in the plan; a plan of one node may run inside any SLURM job."""
    return next(iter(plan.nodes)) if len(plan.nodes) == 1 else os.environ["SLURMD_NODENAME"]


class RayProcess:
    """A `ray start --block` with its processes: a raylet, its agents and, for the head, the control store."""

    def __init__(
        self, arguments: Sequence[str], folder: Path, log_file: Path, environment: Mapping[str, str]
    ):
        folder.mkdir(mode=0o700)
        self.folder = folder
        self.began = time.monotonic()
        self._raylet: psutil.Process | None = None
        command = interpreter("-m", "ray.scripts.scripts", "start", *arguments, f"--temp-dir={folder}")
        self.process = start_logged(
            command,
            log_file,
            env=environment,
            preexec_fn=_before_ray,  # this process has one thread
        )

    @property
    def address(self) -> str | None:
        """Address of the control store; None until the node is registered there."""
        with contextlib.suppress(FileNotFoundError):
            return (self.folder / "ray_current_cluster").read_text(encoding="utf-8").strip() or None
        return None

    @property
    def is_gone(self) -> bool:
        """True if it no longer serves as a node."""
        if self.process.poll() is not None:
            return True
        if self._raylet is None:
            self._raylet = next((child for child in below(self.process.pid) if _is_raylet(child)), None)
            return False
        # When a raylet ends in order, `ray start --block` stays.
        with contextlib.suppress(psutil.NoSuchProcess):
            return not self._raylet.is_running() or self._raylet.status() == psutil.STATUS_ZOMBIE
        return True

    def keep_logs(self, folder: Path) -> None:
        """Copy Ray's logs, which are removed with its sockets."""
        with contextlib.suppress(OSError, shutil.Error):
            shutil.copytree(self.folder / "session_latest" / "logs", folder, dirs_exist_ok=True)

    def end(self) -> None:
        """Kill it, and through the kernel the processes it started: Ray itself has nothing to save."""
        self.process.kill()
        self.process.wait()


def _before_ray() -> None:
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # survives exec: the signal is for workers
    stop_when_parent_ends(signal.SIGKILL)


def below(pid: int) -> list[psutil.Process]:
    """Return all descendants of a process."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


def is_ours(process: psutil.Process) -> bool:
    """Return True if a process belongs to the harness, and saves before it ends, and not to Ray."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return any(part.startswith("harness.") for part in process.cmdline())
    return False


def reap(processes: Sequence[RayProcess]) -> None:
    """Reap the orphans that have ended, but not these processes, for which RayProcess waits."""
    own = {process.process.pid for process in processes}
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess, ChildProcessError):
            if process.pid not in own and process.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(process.pid, os.WNOHANG)


def _is_raylet(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.name() == "raylet"
    return False


if __name__ == "__main__":
    sys.exit(main())
