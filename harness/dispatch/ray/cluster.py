"""A Ray cluster that the harness starts and ends, isolated from other Rays on the same machines.

It uses no default that other Rays use too. Processes that can bind to a port assigned by the kernel; for others free
ports are chosen, and chosen again if one was lost. Each Ray has a temporary folder and a token of its own, and on one
machine it listens on the loopback address alone. A node agent (harness.dispatch.ray.node_agent) on each node starts
Ray's processes, talks to this module through a pipe, and ends Ray when the pipe ends for whatever reason.
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
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from harness.common.disk import make_folder, naming_a_full_disk, write_atomically
from harness.common.gpus import VISIBLE
from harness.common.process import PipeReader, describe_end, ignoring, interpreter, start_logged
from harness.dispatch.ray.host import LOOPBACK, RayDown
from harness.dispatch.worker_process import GRACE_SECONDS
from harness.plan.cluster import Cluster
from harness.study.run import Count, Frozen, WholeNumber

log = logging.getLogger("ssmscale.ray")

START_SECONDS = 300.0
"""Time limit of a start: two processes import Ray one after the other, in 3 s each on an idle core."""
OBJECT_STORE_BYTES = 100 * 2**20
"""Size of the object store, which tasks that train do not use; Ray's minimum is 75 MB."""
DATA_STORE_BYTES = 2**30
"""Size of the object store for Ray Data: more would be taken from the memory of a node's workers."""
LAST_SECONDS = 30.0
"""Time that Ray's own processes have to end after the workers have saved."""


class RayAddress(Frozen):
    """The address of a Ray and the facts that a driver needs; it holds no secret and may be printed."""

    address: str
    """HOST:PORT of its control store, for RAY_ADDRESS."""
    token_file: Path
    """File with its token, readable by the owner alone."""
    dashboard: str | None
    """URL of its dashboard, on the loopback address of `node`; None if it has none."""
    node: str
    """Host of its head."""
    user: str
    temp_dir: Path
    """Folder of Ray's sockets and logs on the head's host; it is removed when Ray ends."""

    def environment(self) -> dict[str, str]:
        """Return the variables that a driver needs before it imports ray."""
        host = self.address.rpartition(":")[0]
        return {"RAY_ADDRESS": self.address, **environment_of_ray(host, self.token_file)}

    def tunnel(self) -> str | None:
        """Return the command that makes the dashboard reachable from another machine."""
        if self.dashboard is None:
            return None
        port = self.dashboard.rpartition(":")[2]
        return f"ssh -L {port}:127.0.0.1:{port} {self.user}@{self.node}"


class NodePlan(Frozen):
    """The plan of a Ray, from which each node agent starts its node."""

    token_file: Path
    log_dir: Path
    nodes: dict[str, str]
    """Address of each node by its name."""
    cpus: Count
    """Cores of each node."""
    gpus: WholeNumber
    """GPUs of each node."""
    dashboard: bool = True
    object_store_bytes: Count = OBJECT_STORE_BYTES
    """Size of each node's object store."""


class NodeEvent(Frozen):
    """An event that a node agent reports as a line of JSON."""

    node: str
    event: Literal["head", "up", "down", "failed", "signal"]
    """`down`: the raylet died and is being replaced; `failed`: the node will not come up again."""
    address: str | None = None
    dashboard: str | None = None
    temp_dir: Path | None = None
    reason: str | None = None
    """Reason of a failure, or name of the signal."""


def environment_of_ray(host: str, token_file: Path) -> dict[str, str]:
    """Return the variables of every process of such a Ray, drivers included; `host` is the address of its nodes."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        "RAY_AUTH_TOKEN": "",  # if not empty it takes precedence over the file
        "RAY_USAGE_STATS_ENABLED": "0",
        # With "1" Ray takes 127.0.0.1 for a mistake and replaces it by the host's address.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0" if host == LOOPBACK else "1",
    }


def make_token(folder: Path) -> Path:
    """Make a token for a new Ray in a file that only the owner can read; raises DiskFull."""
    make_folder(folder)
    path = folder / f"token-{secrets.token_hex(4)}"
    with naming_a_full_disk(path):
        path.touch(mode=0o600, exist_ok=False)
        path.write_text(secrets.token_hex(32) + "\n", encoding="ascii")
    return path


def agent_command(plan: NodePlan) -> list[str]:
    """Return the command line of each node's agent."""
    return interpreter("-u", "-m", "harness.dispatch.ray.node_agent", plan.model_dump_json())


class RayNodes:
    """The node agents of a Ray, started by one command: by srun, or directly if there is one node."""

    def __init__(
        self,
        command: Sequence[str],
        plan: NodePlan,
        environment: Mapping[str, str],
        told: list[str] | None = None,
    ) -> None:
        """Start the agents; names of signals that they receive are added to `told`."""
        self.plan, self._told = plan, told
        self.address: RayAddress | None = None
        self._up: set[str] = set()
        self._head_failure: str | None = None
        make_folder(plan.log_dir)
        self.log = plan.log_dir / "ray.log"
        # In its own session: Ctrl-C does not reach the agents, which this process ends in order.
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = start_logged(command, self.log, env=environment, **pipes)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self._pipe = PipeReader(self._stdout.fileno())

    @property
    def is_alive(self) -> bool:
        """True if any node may run."""
        return self._process.poll() is None

    def check(self) -> None:
        """Raise RayDown if all nodes or the head have ended: no driver can continue without the head."""
        if not self.is_alive:
            raise RayDown(f"Ray ended; {describe_end(self.log)}")
        if self._head_failure is not None:
            raise RayDown(f"Ray ended: {self._head_failure}")

    def listen(self, seconds: float = 0.0) -> list[NodeEvent]:
        """Return the events since the last call, waiting up to `seconds` for the first."""
        if self._pipe.is_ended:  # reading would return at once
            time.sleep(seconds)
        lines = self._pipe.read(seconds)
        events = [NodeEvent.model_validate_json(line) for line in lines if line.startswith(b"{")]
        for event in events:
            self._handle(event)
        return events

    @contextmanager
    def running(self) -> Iterator[RayAddress]:
        """Have a Ray run during the block, with its address in ray.json; raises RayDown if it does not start."""
        address_file = self.plan.log_dir / "ray.json"
        try:
            address = self.wait_until_ready()
            write_atomically(address_file, address.model_dump_json(indent=1) + "\n")
            yield address
        finally:
            address_file.unlink(missing_ok=True)
            self.end()
            self.plan.token_file.unlink(missing_ok=True)

    def wait_until_ready(self) -> RayAddress:
        """Wait until every node is registered; raises RayDown if one fails, or if a signal came meanwhile."""
        deadline = time.monotonic() + START_SECONDS
        while self.address is None or not self._up.issuperset(self.plan.nodes):
            for event in self.listen(0.2):
                if event.event == "failed":
                    raise RayDown(f"Ray did not start on {event.node}: {event.reason}")
            if not self.is_alive:
                raise RayDown(f"Ray did not start; {describe_end(self.log)}")
            if self._told:
                raise RayDown("Ray was told to end before it had started")
            if time.monotonic() > deadline:
                missing = ", ".join(name for name in self.plan.nodes if name not in self._up)
                raise RayDown(
                    f"Ray has not started on {missing} within {START_SECONDS:.0f} s; {describe_end(self.log)}"
                )
        return self.address

    def end(self) -> None:
        """Have workers save, and end every process of Ray."""
        with ignoring(signal.SIGINT, signal.SIGTERM):  # a second Ctrl-C must not leave orphans
            with contextlib.suppress(BrokenPipeError):
                self._stdin.close()
            try:
                self._process.wait(GRACE_SECONDS + LAST_SECONDS)
            except subprocess.TimeoutExpired:
                log.warning("Ray does not end by itself and is killed; see %s", self.log)
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self.listen()  # an agent may have reported a signal
            self._stdout.close()

    def _handle(self, event: NodeEvent) -> None:
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
            # It may have ended, or `end` may have closed the pipe.
            with contextlib.suppress(BrokenPipeError, ValueError):
                self._stdin.write(json.dumps({"join": event.address}).encode() + b"\n")
                self._stdin.flush()
        elif event.event == "up":
            self._up.add(event.node)
        elif event.event == "signal":
            if self._told is not None:
                self._told.append(event.reason or "")
        else:
            self._up.discard(event.node)
            if event.event == "failed" and self.address is not None and event.node == self.address.node:
                self._head_failure = event.reason or "the reason is unknown"
            log.warning("Ray on %s: %s", event.node, event.reason)


@contextmanager
def ray_here(
    cluster: Cluster, folder: Path, *, dashboard: bool = True, object_store_bytes: int = OBJECT_STORE_BYTES
) -> Iterator[RayAddress]:
    """Run a Ray on this machine during the block, with the cores and GPUs of `cluster`.

    `folder` takes its token, its log and ray.json. When the block ends, also by Ctrl-C, or this process is killed,
    workers save and every process of Ray ends. Raises RayDown if Ray does not start.
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
        object_store_bytes=object_store_bytes,
    )
    # By their names, since the indices of MIG slices are not those of GPUs.
    names = {VISIBLE: ",".join(cluster.device_names)} if cluster.device_names else {}
    nodes = RayNodes(agent_command(plan), plan, {**os.environ, **names})
    try:
        with nodes.running() as address:
            yield address
    finally:
        if nodes.address is not None:
            shutil.rmtree(
                nodes.address.temp_dir.parent, ignore_errors=True
            )  # remains if the agent was killed
