"""A Ray of our own, started and ended by us: beside others on the same machines, and never in their way.

Nothing about it is a default that somebody else's Ray has too. What can listens on a port the kernel gives it when it
binds; for what cannot, ports that are free are chosen, others where one was lost in between. Each Ray has a temporary
folder and a token of its own; on one machine it listens on the loopback alone. Its nodes are kept by processes of ours
(harness.dispatch.ray.node_agent), which are spoken to through one pipe and end what they started when that pipe does,
however its other end ended.
"""

from __future__ import annotations

import contextlib
import getpass
import importlib.util
import json
import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from harness.common.disk import make_folder, naming_a_full_disk, write_atomically
from harness.common.process import PipeReader, last_line
from harness.dispatch.ray.host import LOOPBACK, RayDown
from harness.dispatch.worker_process import GRACE_SECONDS
from harness.plan.cluster import Cluster
from harness.study.run import Count, Frozen, WholeNumber

log = logging.getLogger("ssmscale.ray")

START_SECONDS = 300.0
"""Two processes that import Ray one after the other, 3 s each on an idle core; a busy machine takes its time."""
LAST_SECONDS = 30.0
"""What Ray itself may take to end, beside workers that save."""


class RayAddress(Frozen):
    """Where a Ray is and how to talk to it; without the token, so that it may be shown."""

    address: str
    """HOST:PORT of its control store, as RAY_ADDRESS takes it."""
    token_file: Path
    """Readable by its owner alone."""
    dashboard: str | None
    """Its page, on the loopback of `node`; None where ray[default] is not installed there or nobody asked for it."""
    node: str
    """Host of its head."""
    user: str
    temp_dir: Path
    """Folder of Ray's sockets and logs on the head's host; it goes when Ray does."""

    def environment(self) -> dict[str, str]:
        """What a driver's environment needs before it imports ray."""
        host = self.address.rpartition(":")[0]
        return {"RAY_ADDRESS": self.address, **environment_of_ray(host, self.token_file)}

    def tunnel(self) -> str | None:
        """The line by which the dashboard is seen on another machine."""
        if self.dashboard is None:
            return None
        port = self.dashboard.rpartition(":")[2]
        return f"ssh -L {port}:127.0.0.1:{port} {self.user}@{self.node}"


class NodePlan(Frozen):
    """What the agents of all nodes are told when they start."""

    token_file: Path
    log_dir: Path
    nodes: dict[str, str]
    """Addresses of the nodes by name."""
    cpus: Count
    """Cores of each."""
    gpus: WholeNumber
    """GPUs of each."""
    dashboard: bool = True


class NodeEvent(Frozen):
    """What a agent says of its node, a line of JSON each."""

    node: str
    event: Literal["head", "up", "down", "failed", "signal"]
    """`failed`: it will not come up any more; `down`: its raylet died and is being replaced."""
    address: str | None = None
    dashboard: str | None = None
    temp_dir: Path | None = None
    reason: str | None = None
    """Why it is down, or which signal came."""


def environment_of_ray(host: str, token_file: Path) -> dict[str, str]:
    """What every process of a Ray of ours is told, drivers included; `host` is the address its nodes have."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        "RAY_AUTH_TOKEN": "",  # goes before the file where it is not empty
        "RAY_USAGE_STATS_ENABLED": "0",
        # On the loopback alone: else Ray takes 127.0.0.1 for a mistake and puts this host's address in its place.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0" if host == LOOPBACK else "1",
    }


def make_token(folder: Path) -> Path:
    """Make a token for a new Ray in a file that nobody else can read; raises DiskFull."""
    make_folder(folder)
    path = folder / f"token-{secrets.token_hex(4)}"
    with naming_a_full_disk(path):
        path.touch(mode=0o600, exist_ok=False)
        path.write_text(secrets.token_hex(32) + "\n", encoding="ascii")
    return path


def read_address(path: Path) -> RayAddress | None:
    """What was written of a Ray that runs; None where none does."""
    try:
        return RayAddress.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None


class RayNodes:
    """The agents of a Ray's nodes, as the processes of one command: srun's, or the only one itself."""

    def __init__(
        self,
        command: Sequence[str],
        plan: NodePlan,
        environment: Mapping[str, str],
        on_signal: Callable[[str], object] = lambda _: None,
    ) -> None:
        self.plan = plan
        self._on_signal = on_signal
        self.address: RayAddress | None = None
        self._up: set[str] = set()
        self._headless: str | None = None
        make_folder(plan.log_dir)
        self.log = plan.log_dir / "ray.log"
        with self.log.open("ab") as said:
            self._process = subprocess.Popen(
                [
                    *command,
                    sys.executable,
                    "-u",
                    "-m",
                    "harness.dispatch.ray.node_agent",
                    plan.model_dump_json(),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                env=environment,
                start_new_session=True,  # Ctrl-C is for us: we end it, in order
            )
        assert self._process.stdout is not None
        self._said = PipeReader(self._process.stdout.fileno())

    @property
    def is_alive(self) -> bool:
        """Whether a node may still be there."""
        return self._process.poll() is None

    def check(self) -> None:
        """Raise RayDown where its nodes are gone, or its head is, without which no driver gets further."""
        if not self.is_alive:
            raise RayDown(f"Ray ended; {self._ending()}")
        if self._headless is not None:
            raise RayDown(f"Ray ended: {self._headless}")

    def listen(self, seconds: float = 0.0) -> list[NodeEvent]:
        """What the agents said since the last call, waited for at most that long."""
        if self._said.is_ended:  # its end would be heard of at once, again and again
            time.sleep(seconds)
        lines = self._said.read(seconds)
        events = [NodeEvent.model_validate_json(line) for line in lines if line.startswith(b"{")]
        for event in events:
            self._take_up(event)
        return events

    def wait_until_ready(
        self, seconds: float = START_SECONDS, wanted: Callable[[], bool] = lambda: True
    ) -> RayAddress:
        """Return once every node is registered with what it offers; raises RayDown, saying what is missing.

        Nor is it waited for any longer when it is not `wanted` any more.
        """
        deadline = time.monotonic() + seconds
        while self.address is None or not self._up.issuperset(self.plan.nodes):
            for event in self.listen(0.2):
                if event.event == "failed":
                    raise RayDown(f"Ray did not start on {event.node}: {event.reason}")
            if not self.is_alive:
                raise RayDown(f"Ray did not start; {self._ending()}")
            if not wanted():
                raise RayDown("Ray was told to end before it had started")
            if time.monotonic() > deadline:
                missing = [name for name in self.plan.nodes if name not in self._up]
                raise RayDown(
                    f"Ray has not started on {', '.join(missing)} within {seconds:.0f} s; {self._ending()}"
                )
        return self.address

    def end(self) -> None:
        """Have workers save and every process of Ray's end; kills what does not."""
        with _ignoring(signal.SIGINT, signal.SIGTERM):  # impatience must not leave orphans
            assert self._process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
            try:
                self._process.wait(GRACE_SECONDS + LAST_SECONDS)
            except subprocess.TimeoutExpired:
                log.warning("Ray does not end by itself and is killed; see %s", self.log)
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            assert self._process.stdout is not None
            self.listen()  # a signal may have come meanwhile
            self._process.stdout.close()

    def _take_up(self, event: NodeEvent) -> None:
        if event.event == "head":
            assert event.address is not None
            assert event.temp_dir is not None
            self.address = RayAddress(
                address=event.address,
                token_file=self.plan.token_file,
                dashboard=event.dashboard,
                node=event.node,
                user=getpass.getuser(),
                temp_dir=event.temp_dir,
            )
            assert self._process.stdin is not None
            with contextlib.suppress(BrokenPipeError, ValueError):  # it is gone, or is being ended
                self._process.stdin.write(json.dumps({"join": event.address}).encode() + b"\n")
                self._process.stdin.flush()
        elif event.event == "up":
            self._up.add(event.node)
        elif event.event == "signal":
            self._on_signal(event.reason or "")
        else:
            self._up.discard(event.node)
            if event.event == "failed" and self.address is not None and event.node == self.address.node:
                self._headless = event.reason or "nobody knows why"
            log.warning("Ray on %s: %s", event.node, event.reason)

    def _ending(self) -> str:
        return f"{self.log} ends: {last_line(self.log)}"


@contextmanager
def ray_on(
    command: Sequence[str],
    plan: NodePlan,
    environment: Mapping[str, str],
    on_signal: Callable[[str], object] = lambda _: None,
    wanted: Callable[[], bool] = lambda: True,
) -> Iterator[RayNodes]:
    """A Ray on the nodes of a plan while the block runs; the plan's folder takes its address, as ray.json.

    Raises RayDown where it does not start, or is not `wanted` any more before it has.
    """
    told = plan.log_dir / "ray.json"
    nodes = RayNodes(command, plan, environment, on_signal)
    try:
        address = nodes.wait_until_ready(wanted=wanted)
        write_atomically(told, address.model_dump_json(indent=1) + "\n")
        yield nodes
    finally:
        told.unlink(missing_ok=True)
        nodes.end()
        plan.token_file.unlink(missing_ok=True)


@contextmanager
def ray_here(cluster: Cluster, folder: Path, *, dashboard: bool = True) -> Iterator[RayAddress]:
    """A Ray on this machine while the block runs, offering the cores and GPUs of `cluster`.

    `folder` takes its token, its log and, as ray.json, its address. When the block is left, by Ctrl-C too, workers save
    and every process of Ray's ends; they also do where this process is killed. Raises RayDown where Ray does not start.
    """
    if importlib.util.find_spec("ray") is None:
        raise ModuleNotFoundError("no ray", name="ray")
    folder = folder.absolute()
    plan = NodePlan(
        token_file=make_token(folder),
        log_dir=folder,
        nodes={os.uname().nodename: LOOPBACK},
        cpus=cluster.cores,
        gpus=cluster.gpus,
        dashboard=dashboard,
    )
    address = None
    try:
        with ray_on([], plan, os.environ) as nodes:
            address = nodes.address
            assert address is not None
            yield address
    finally:
        if address is not None:
            shutil.rmtree(address.temp_dir.parent, ignore_errors=True)  # where its agent was killed


@contextmanager
def _ignoring(*numbers: signal.Signals) -> Iterator[None]:
    try:
        previous = [(number, signal.signal(number, signal.SIG_IGN)) for number in numbers]
    except ValueError:  # not the main thread, which signals do not reach
        previous = []
    try:
        yield
    finally:
        for number, handler in previous:
            signal.signal(number, handler)
