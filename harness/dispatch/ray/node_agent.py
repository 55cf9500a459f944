"""Keeps one node of a Ray of ours: starts its processes, replaces its raylet when that dies, ends all of it.

    python -m harness.dispatch.ray.node_agent PLAN     PLAN is JSON, a cluster.NodePlan; a task of srun's, or alone

It is told on standard input where the head is, and by the end of that input to end; it tells on standard output what
becomes of the node. The head works nothing by itself: drivers hang on it, so that a raylet which dies takes its own
workers along and nobody else. SLURM signals every process of a step: this one tells of it, Ray's processes ignore the
one before a time limit, and what a raylet that was ended leaves behind is given the time to save.

One `ray start` on a node, whose processes live and die together, and what is left of it when it is gone.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from harness.common.process import (
    PipeReader,
    adopt_orphans,
    last_line,
    log_to_stderr,
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

OBJECT_STORE_BYTES = 100 * 2**20
"""Nothing is passed through it here; 75 MB is the least that Ray takes."""
STEADY_SECONDS = 60.0
"""What ran so long did start: its death is not held against the next start."""
REAP_SECONDS = 10.0
BETWEEN = 0.2
"""Seconds from one look at the processes to the next."""


class NodeAgent:
    """Everything of Ray on this node."""

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
        self.is_told = False
        """Whether the head's address has gone out, and whether this node has been called up."""
        self.is_up = False
        self.is_ending = False
        """Whether SLURM is ending the step, so that what goes is not replaced."""
        self._join: str | None = None
        self._told = PipeReader(0)
        self._failures = 0
        self._starts = 0
        self._reaped = 0.0

    def run(self) -> None:
        """Keep the node until standard input ends; raises RayDown where it cannot be kept."""
        for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
            signal.signal(number, self._tell_signal)
        if self.is_first:
            self.head = self._start_head()
        while self._listen():
            self._reap_now_and_then()
            if self.head is not None:
                self._keep_head(self.head)
            if self._join is not None:
                self._keep_worker(self._join)

    @property
    def processes(self) -> list[RayProcess]:
        """What is there of worker and head."""
        return [process for process in (self.worker, self.head) if process is not None]

    def end(self) -> None:
        """End Ray, wait for workers that save, and leave nothing behind."""
        for process in self.processes:
            process.end()
        self._clear(keep=None)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _keep_head(self, head: RayProcess) -> None:
        if head.is_gone:
            if self.is_ending:
                return
            if self.is_told:
                head.keep_logs(self.plan.log_dir / f"ray-{self.name}-head")
                raise RayDown(f"its head ended; {self._ending()}")
            head.end()
            self._count_failure(head)
            self.head = self._start_head()
        elif not self.is_told and (address := head.address) is not None:
            self.is_told = True
            dashboard = None
            if self.plan.dashboard and not (head.folder / NO_DASHBOARD).exists():
                dashboard = f"http://{LOOPBACK}:{self._dashboard_port}"
            self._say(
                NodeEvent(
                    node=self.name, event="head", address=address, dashboard=dashboard, temp_dir=head.folder
                )
            )

    def _keep_worker(self, address: str) -> None:
        worker = self.worker
        if worker is None:
            self.worker = self._start_worker(address)
        elif worker.is_gone:
            if self.is_ending:
                return
            if self.is_up:
                self.is_up = False
                self._say(
                    NodeEvent(node=self.name, event="down", reason=f"its raylet ended; {self._ending()}")
                )
            if time.monotonic() - worker.began > STEADY_SECONDS:
                self._failures = 0
            worker.end()
            self._count_failure(worker)
            self._clear(keep=self.head)  # what it held, its successor gives to others
            self.worker = self._start_worker(address)
        elif not self.is_up and worker.address is not None:
            self.is_up = True
            self._say(NodeEvent(node=self.name, event="up"))

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
        # At port 0 whoever listens is given a port that nobody has, and tells the others. A raylet does not wait long
        # for its agents to tell (see harness.dispatch.ray.start_hook), so theirs are chosen here.
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
            f"--object-store-memory={OBJECT_STORE_BYTES}",
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
            "RAY_START_HOOK": "harness.dispatch.ray.start_hook.adjust",
            NODE_ADDRESS: self.ip,
            # A worker's own children save when it is gone, and then end by themselves.
            "RAY_kill_child_processes_on_worker_exit": "0",
            "RAY_worker_niceness": "0",  # ranks are what the node is for, and Ray would put all others before them
            # It would kill ours for the memory that others on the node take; SLURM sees to ours.
            "RAY_memory_monitor_refresh_ms": "0",
            # A raylet that was killed is missed after 5 s and not after 15.
            "RAY_health_check_period_ms": "1000",
            # A busy machine takes long to import what agents, the dashboard, its parts and workers need.
            "RAY_agent_register_timeout_ms": "300000",
            "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "300",
            "RAY_DASHBOARD_SUBPROCESS_MODULE_WAIT_READY_TIMEOUT": "300",
            "RAY_worker_register_timeout_seconds": "300",
            "DASHBOARD_METRIC_PORT": "0",  # the dashboard's own metrics listen at a fixed port otherwise
        }

    def _reap_now_and_then(self) -> None:
        if time.monotonic() - self._reaped > REAP_SECONDS:  # all processes of the machine are looked through
            self._reaped = time.monotonic()
            reap(self.processes)

    def _count_failure(self, process: RayProcess) -> None:
        self._failures += 1
        process.keep_logs(self.plan.log_dir / f"ray-{self.name}-{self._starts}")
        if self._failures >= MOST_ATTEMPTS:
            raise RayDown(f"ended {self._failures} times in a row; {self._ending()}")

    def _listen(self) -> bool:
        """Take up what is said on standard input, for a moment; False when it has ended."""
        for line in self._told.read(BETWEEN):
            self._join = json.loads(line)["join"]
        return not self._told.is_ended

    def _clear(self, keep: RayProcess | None) -> None:
        """Wait for workers whose raylet is gone while they save, and kill whatever else is left of it."""
        kept = {keep.process.pid, *(child.pid for child in below(keep.process.pid))} if keep else set()
        left = [process for process in below(os.getpid()) if process.pid not in kept]
        ours = [process for process in left if is_ours(process)]
        spared = {one.pid for process in ours for one in (process, *below(process.pid))}
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.pid not in spared:
                    process.kill()
                elif (
                    process in ours and "harness.tracking.live" not in process.cmdline()
                ):  # which ends with its worker
                    process.terminate()
        psutil.wait_procs(ours, timeout=GRACE_SECONDS)
        for process in below(os.getpid()):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.pid not in kept:
                    process.kill()
        reap(self.processes)

    def _tell_signal(self, number: int, _frame: object) -> None:
        self.is_ending = self.is_ending or number == signal.SIGTERM
        self._say(NodeEvent(node=self.name, event="signal", reason=signal.Signals(number).name))

    def _say(self, event: NodeEvent) -> None:
        with contextlib.suppress(BrokenPipeError):  # whoever listened is gone, and standard input ends too
            os.write(1, event.model_dump_json(exclude_none=True).encode() + b"\n")

    def _ending(self) -> str:
        return f"{self.log_file} ends: {last_line(self.log_file)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Keep this host's node of the Ray that the plan describes; returns the exit status."""
    log_to_stderr()
    (text,) = arguments if arguments is not None else sys.argv[1:]
    plan = NodePlan.model_validate_json(text)
    adopt_orphans()  # they stay ours to end
    agent = None
    try:
        agent = NodeAgent(plan)
        agent.run()
    except RayDown as down:
        event = NodeEvent(node=name_in(plan), event="failed", reason=str(down))
        sys.stdout.write(event.model_dump_json() + "\n")
        sys.stdout.flush()
        return 1
    finally:
        if agent is not None:
            agent.end()
    return 0


def name_in(plan: NodePlan) -> str:
    """What the plan calls this node; a Ray of one machine may be started inside some job of SLURM's."""
    return next(iter(plan.nodes)) if len(plan.nodes) == 1 else os.environ["SLURMD_NODENAME"]


class RayProcess:
    """One `ray start --block` and what it started: a raylet and its agents, and with the head the control store."""

    def __init__(
        self, arguments: Sequence[str], folder: Path, log_file: Path, environment: Mapping[str, str]
    ):
        folder.mkdir(mode=0o700)
        self.folder = folder
        self.began = time.monotonic()
        self._raylet: psutil.Process | None = None
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *arguments, f"--temp-dir={folder}"]
        with log_file.open("ab") as said:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                env=environment,
                start_new_session=True,
                preexec_fn=_before_ray,  # noqa: PLW1509  this process has one thread
            )

    @property
    def address(self) -> str | None:
        """The control store's address once the node is registered there; None before."""
        with contextlib.suppress(FileNotFoundError):
            return (self.folder / "ray_current_cluster").read_text(encoding="utf-8").strip() or None
        return None

    @property
    def is_gone(self) -> bool:
        """Whether it does not serve as a node any more."""
        if self.process.poll() is not None:
            return True
        if self._raylet is None:
            self._raylet = next((child for child in below(self.process.pid) if _is_raylet(child)), None)
            return False
        # A raylet that ends in order leaves `ray start --block` behind.
        with contextlib.suppress(psutil.NoSuchProcess):
            return not self._raylet.is_running() or self._raylet.status() == psutil.STATUS_ZOMBIE
        return True

    def keep_logs(self, folder: Path) -> None:
        """Copy what Ray logged, which goes with its sockets."""
        with contextlib.suppress(OSError, shutil.Error):
            shutil.copytree(self.folder / "session_latest" / "logs", folder, dirs_exist_ok=True)

    def end(self) -> None:
        """End it and, by the kernel, what it started: there is nothing in Ray to be saved."""
        self.process.kill()
        self.process.wait()


def _before_ray() -> None:
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # which is passed on through exec: it is meant for workers
    stop_when_parent_ends(signal.SIGKILL)


def below(pid: int) -> list[psutil.Process]:
    """A process's children and theirs."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


def is_ours(process: psutil.Process) -> bool:
    """Whether a process is the harness's own, which saves before it ends, and not Ray's."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return any(part.startswith("harness.") for part in process.cmdline())
    return False


def reap(processes: Sequence[RayProcess]) -> None:
    """Let go of orphans that have ended; those who were started here are waited for by name."""
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
