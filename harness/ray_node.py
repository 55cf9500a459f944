"""Keeps one node of a Ray of ours: starts its processes, replaces its raylet when that dies, ends all of it.

    python -m harness.ray_node PLAN     PLAN is JSON, a harness.ray_cluster.NodePlan; a task of srun's, or alone

It is told on standard input where the head is, and by the end of that input to end; it tells on standard output what
becomes of the node. The head works nothing by itself: drivers hang on it, so that a raylet which dies takes its own
workers along and nobody else. SLURM signals every process of a step: this one tells of it, Ray's processes ignore the
one before a time limit, and what a raylet that was ended leaves behind is given the time to save.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from harness.dispatch.base import MOST_ATTEMPTS
from harness.dispatch.rank_process import GRACE_SECONDS
from harness.ray_cluster import (
    LOOPBACK,
    NodePlan,
    RayDown,
    Word,
    environment_of_ray,
    last_line,
    remove_folder,
    temporary_folder,
)
from harness.ray_hook import NO_DASHBOARD, NODE_ADDRESS

log = logging.getLogger("ssmscale.ray")

OBJECT_STORE_BYTES = 100 * 2**20
"""Nothing is passed through it here; 75 MB is the least that Ray takes."""
STEADY_SECONDS = 60.0
"""What ran so long did start: its death is not held against the next start."""
BETWEEN = 0.2
"""Seconds from one look at the processes to the next."""


class Member:
    """One `ray start --block` and what it started: a raylet and its agents, and with the head the control store."""

    def __init__(self, arguments: Sequence[str], folder: Path, log_file: Path, environment: dict[str, str]):
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
            self._raylet = next((child for child in _below(self.process.pid) if _is_raylet(child)), None)
            return False
        # A raylet that ends in order leaves `ray start --block` behind.
        with contextlib.suppress(psutil.NoSuchProcess):
            return not self._raylet.is_running() or self._raylet.status() == psutil.STATUS_ZOMBIE
        return True

    def end(self) -> None:
        """End it and, by the kernel, what it started: there is nothing in Ray to be saved."""
        self.process.kill()
        self.process.wait()


class Keeper:
    """Everything of Ray on this node."""

    def __init__(self, plan: NodePlan) -> None:
        self.plan = plan
        self.name = os.environ.get("SLURMD_NODENAME") or os.uname().nodename
        self.is_first = os.environ.get("SLURM_NODEID", "0") == "0"
        self.ip = address_towards([place for name, place in plan.nodes.items() if name != self.name])
        self.devices = offered_gpus(os.environ, plan.gpus)
        self.folder = temporary_folder(os.environ)
        self.log_file = plan.log_dir / f"ray-{self.name}.log"
        self.head: Member | None = None
        self.worker: Member | None = None
        self.is_told = False
        """Whether the head's address has gone out, and whether this node has been called up."""
        self.is_up = False
        self.is_ending = False
        """Whether SLURM is ending the step, so that what goes is not replaced."""
        self._join: str | None = None
        self._heard = b""
        self._failures = 0
        self._starts = 0

    def run(self) -> None:
        """Keep the node until standard input ends; raises RayDown where it cannot be kept."""
        for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
            signal.signal(number, self._tell_signal)
        if self.is_first:
            self.head = self._start_head()
        while self._listen():
            _reap(self.processes)
            if self.head is not None:
                self._keep_head(self.head)
            if self._join is not None:
                self._keep_worker(self._join)

    @property
    def processes(self) -> list[Member]:
        """What is there of worker and head."""
        return [member for member in (self.worker, self.head) if member is not None]

    def end(self) -> None:
        """End Ray, wait for workers that save, and leave nothing behind."""
        for member in self.processes:
            member.end()
        self._clear(keep=None)
        remove_folder(self.folder)

    def _keep_head(self, head: Member) -> None:
        if head.is_gone:
            if self.is_told or self.is_ending:
                raise RayDown(f"its head ended; {self._ending()}")
            head.end()
            self._count_failure()
            self.head = self._start_head()
        elif not self.is_told and (address := head.address) is not None:
            self.is_told = True
            dashboard = None
            if self.plan.dashboard and not (head.folder / NO_DASHBOARD).exists():
                dashboard = f"http://{LOOPBACK}:{self._dashboard_port}"
            self._say(
                Word(node=self.name, event="head", address=address, dashboard=dashboard, temp_dir=head.folder)
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
                self._say(Word(node=self.name, event="down", reason=f"its raylet ended; {self._ending()}"))
            if time.monotonic() - worker.began > STEADY_SECONDS:
                self._failures = 0
            worker.end()
            self._count_failure()
            self._clear(keep=self.head)  # what it held, its successor gives to others
            self.worker = self._start_worker(address)
        elif not self.is_up and worker.address is not None:
            self.is_up = True
            self._say(Word(node=self.name, event="up"))

    def _start_head(self) -> Member:
        self._dashboard_port = free_port()
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

    def _start_worker(self, address: str) -> Member:
        arguments = [
            f"--address={address}",
            f"--node-name={self.name}",
            f"--num-cpus={self.plan.cpus}",
            f"--num-gpus={self.plan.gpus}",
        ]
        return self._start("worker", arguments, self.devices)

    def _start(self, role: str, arguments: Sequence[str], devices: Sequence[str] | None) -> Member:
        # At port 0 whoever listens is given a port that nobody has, and tells the others.
        ports = (
            "node-manager-port",
            "object-manager-port",
            "min-worker-port",
            "max-worker-port",
            "dashboard-agent-listen-port",
            "dashboard-agent-grpc-port",
            "runtime-env-agent-port",
            "metrics-export-port",
        )
        common = [
            "--block",
            *(f"--{name}=0" for name in ports),
            f"--object-store-memory={OBJECT_STORE_BYTES}",
            "--include-log-monitor=false",
            "--disable-usage-stats",
        ]
        self._starts += 1
        folder = self.folder / f"{role}-{self._starts}"
        return Member([*arguments, *common], folder, self.log_file, self._environment(devices))

    def _environment(self, devices: Sequence[str] | None) -> dict[str, str]:
        own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        if devices is not None:
            own["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        return {
            **own,
            **environment_of_ray(self.ip, self.plan.token_file),
            "RAY_START_HOOK": "harness.ray_hook.adjust",
            NODE_ADDRESS: self.ip,
            # A worker's own children save when it is gone, and then end by themselves.
            "RAY_kill_child_processes_on_worker_exit": "0",
            # It would kill ours for the memory that others on the node take; SLURM sees to ours.
            "RAY_memory_monitor_refresh_ms": "0",
            # A raylet that was killed is missed after 5 s and not after 15.
            "RAY_health_check_period_ms": "1000",
            "DASHBOARD_METRIC_PORT": "0",  # the dashboard's own metrics listen at a fixed port otherwise
        }

    def _count_failure(self) -> None:
        self._failures += 1
        if self._failures >= MOST_ATTEMPTS:
            raise RayDown(f"ended {self._failures} times in a row; {self._ending()}")

    def _listen(self) -> bool:
        """Take up what is said on standard input, for a moment; False when it has ended."""
        if not select.select([0], [], [], BETWEEN)[0]:
            return True
        part = os.read(0, 65536)
        self._heard += part
        *lines, self._heard = self._heard.split(b"\n")
        for line in lines:
            self._join = json.loads(line)["join"]
        return bool(part)

    def _clear(self, keep: Member | None) -> None:
        """Wait for workers whose raylet is gone while they save, and kill whatever else is left of it."""
        kept = {keep.process.pid, *(child.pid for child in _below(keep.process.pid))} if keep else set()
        left = [process for process in _below(os.getpid()) if process.pid not in kept]
        savers = [process for process in left if _is_worker(process)]
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate() if process in savers else process.kill()
        _, stuck = psutil.wait_procs(savers, timeout=GRACE_SECONDS)
        for process in [*stuck, *(child for child in _below(os.getpid()) if child.pid not in kept)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        _reap(self.processes)

    def _tell_signal(self, number: int, _frame: object) -> None:
        self.is_ending = self.is_ending or number == signal.SIGTERM
        self._say(Word(node=self.name, event="signal", reason=signal.Signals(number).name))

    def _say(self, word: Word) -> None:
        with contextlib.suppress(BrokenPipeError):  # whoever listened is gone, and standard input ends too
            os.write(1, word.model_dump_json(exclude_none=True).encode() + b"\n")

    def _ending(self) -> str:
        return f"{self.log_file} ends: {last_line(self.log_file)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Keep this host's node of the Ray that the plan describes; returns the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    (text,) = arguments if arguments is not None else sys.argv[1:]
    plan = NodePlan.model_validate_json(text)
    set_child_subreaper = 36
    ctypes.CDLL(None).prctl(set_child_subreaper, 1, 0, 0, 0)  # orphans stay ours to end
    keeper = None
    try:
        keeper = Keeper(plan)
        keeper.run()
    except RayDown as down:
        name = os.environ.get("SLURMD_NODENAME") or os.uname().nodename
        sys.stdout.write(Word(node=name, event="failed", reason=str(down)).model_dump_json() + "\n")
        sys.stdout.flush()
        return 1
    finally:
        if keeper is not None:
            keeper.end()
    return 0


def address_towards(others: Sequence[str]) -> str:
    """The address by which other hosts reach this one; the loopback where there are none, or all of them are here.

    Raises RayDown where one of them is not known here.
    """
    for other in others:
        try:
            kind, _, _, _, place = socket.getaddrinfo(other, 9, type=socket.SOCK_DGRAM)[0]
        except OSError as error:
            raise RayDown(f"{other}: is not known by that name on {os.uname().nodename}") from error
        with socket.socket(kind, socket.SOCK_DGRAM) as trial:
            trial.connect(place)  # sends nothing
            address = str(trial.getsockname()[0])
        if not address.startswith("127.") and address != "::1":
            return address
    return LOOPBACK


def offered_gpus(environment: dict[str, str] | os._Environ[str], wanted: int) -> list[str] | None:
    """Names of the GPUs that this node offers, as CUDA_VISIBLE_DEVICES takes them; None for the first ones there are.

    What SLURM puts into CUDA_VISIBLE_DEVICES goes before its own numbers: where it hides devices they begin at 0.
    Raises RayDown where there are fewer than `wanted`.
    """
    if not wanted:
        return []
    for variable in ("CUDA_VISIBLE_DEVICES", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS"):
        if variable in environment:
            found = [name.strip() for name in environment[variable].split(",") if name.strip()]
            if len(found) < wanted:
                raise RayDown(f"{variable}={environment[variable]}: offers {len(found)} of {wanted} GPUs")
            return found[:wanted]
    return None


def free_port() -> int:
    """A port of the loopback that nobody listens on now; one that is lost by the time it is used is chosen again."""
    with socket.socket() as trial:
        trial.bind((LOOPBACK, 0))
        return int(trial.getsockname()[1])


def _before_ray() -> None:
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # which is passed on through exec: it is meant for workers
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, int(signal.SIGKILL), 0, 0, 0)


def _below(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


def _is_raylet(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.name() == "raylet"
    return False


def _is_worker(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return "harness.worker" in process.cmdline()
    return False


def _reap(members: Sequence[Member]) -> None:
    """Let go of orphans that have ended; those who were started here are waited for by name."""
    own = {member.process.pid for member in members}
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess, ChildProcessError):
            if process.pid not in own and process.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(process.pid, os.WNOHANG)


if __name__ == "__main__":
    sys.exit(main())
