"""Rays of tests, each in a process of its own that can be stopped, interrupted and killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from harness.dispatch.ray.cluster import RayAddress
from tests.waiting import PATIENCE, is_running, wait_until

HERE = """\
import sys
from pathlib import Path
from harness.plan.cluster import Cluster
from harness.dispatch.ray.cluster import ray_here

folder, gpus, dashboard = sys.argv[1:]
cluster = Cluster("here", nodes=1, gpus=int(gpus), cores=2, memory_gib=4.0)
try:
    with ray_here(cluster, Path(folder), dashboard=bool(int(dashboard))) as where:
        print(where.model_dump_json(), flush=True)
        sys.stdin.read()
except KeyboardInterrupt:
    print("stopped", flush=True)
"""
WITHOUT_MLFLOW = "import sys; sys.modules['mlflow'] = None\n"
WITHOUT_DASHBOARD = """\
from functools import partial
from harness.cli.app import main
from harness.dispatch.ray import here

here.ray_here = partial(here.ray_here, dashboard=False)
main()
"""
"""Programs that run the command without importing MLflow, and with no dashboard for a Ray of this machine."""
SAVER = """\
import signal, sys, time
from pathlib import Path

def save(*_):
    time.sleep(0.5)
    file.write_text("saved")
    sys.exit()

file = Path(sys.argv[1])
signal.signal(signal.SIGTERM, save)
file.write_text("trains")
while True:
    signal.pause()
"""
DRIVER = """\
import contextlib, json, os, subprocess, sys, time
import ray

ray.init(log_to_driver=False)
nodes = []
while not any("CPU" in node["Resources"] for node in nodes):
    time.sleep(0.1 if nodes else 0)  # only the head: the raylet is being replaced, since another process had its port
    nodes = [node for node in ray.nodes() if node["Alive"]]
print(json.dumps(sorted((node["NodeName"], node["Resources"]) for node in nodes)), flush=True)

class Device:
    def name(self):
        return os.environ["CUDA_VISIBLE_DEVICES"]

    def train(self, *command):
        self.child = subprocess.Popen(command, start_new_session=True)

kept = []
for line in sys.stdin:
    if line.startswith("["):
        kept.append(ray.remote(Device).options(num_gpus=0.1, num_cpus=0).remote())
        ray.get(kept[-1].train.remote(*json.loads(line)))
        continue
    found = None
    while found is None:
        while ray.available_resources().get("GPU") != ray.cluster_resources().get("GPU"):
            time.sleep(0.1)  # Ray counts released GPUs and lost nodes a moment later
        devices = [ray.remote(Device).options(num_gpus=float(line), num_cpus=0).remote() for _ in range(2)]
        with contextlib.suppress(ray.exceptions.RayError):
            found = sorted(ray.get([device.name.remote() for device in devices]))
        for device in devices:
            ray.kill(device)
    print(json.dumps(found), flush=True)
"""


class Here:
    """A process that runs a Ray."""

    def __init__(self, folder: Path, *, devices: str = "", dashboard: bool = False) -> None:
        """Start it."""
        self.folder, self.devices = folder, [name for name in devices.split(",") if name]
        arguments = [str(folder), str(len(self.devices)), str(int(dashboard))]
        self.process = subprocess.Popen(
            [sys.executable, "-c", HERE, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": devices},
            start_new_session=True,  # as a shell gives a command a process group, to which Ctrl-C goes
        )
        self.started: list[psutil.Process] = []
        self._address: RayAddress | None = None

    @property
    def address(self) -> RayAddress:
        """Address of the Ray, once it runs."""
        if self._address is None:
            assert self.process.stdout is not None
            line = self.process.stdout.readline()
            assert line, (self.folder / "ray.log").read_text()
            self._address = RayAddress.model_validate_json(line)
            self.started = psutil.Process(self.process.pid).children(recursive=True)
        return self._address

    def raylets(self) -> list[psutil.Process]:
        """Return the raylets that run, the head's first."""
        found = psutil.Process(self.process.pid).children(recursive=True)
        self.started += [process for process in found if process not in self.started]
        return sorted(filter(_is_raylet, found), key=lambda process: process.create_time())

    def listening(self) -> set[tuple[str, int]]:
        """Return the addresses and ports at which its processes listen."""
        return {
            (connection.laddr.ip.removeprefix("::ffff:"), connection.laddr.port)
            for process in psutil.Process(self.process.pid).children(recursive=True)
            for connection in _connections(process)
            if connection.status == psutil.CONN_LISTEN
        }

    def is_gone(self) -> bool:
        """True if no process and no file of it is left."""
        left = [process for process in self.started if is_running(process)]
        return not left and not self.address.temp_dir.exists()

    def interrupt(self) -> str:
        """Send Ctrl-C to its process group; returns its last output."""
        os.killpg(self.process.pid, signal.SIGINT)
        said, _ = self.process.communicate(timeout=PATIENCE)
        return said

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """End it, if it still runs."""
        if self.process.poll() is None:
            with contextlib.suppress(BrokenPipeError):
                self.process.communicate(timeout=PATIENCE)
        if self._address is not None:
            wait_until(self.is_gone)


class Driver:
    """A process that uses a Ray."""

    def __init__(self, address: RayAddress, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **address.environment(), **environment},
        )
        self._nodes: dict[str, dict[str, float]] | None = None

    def nodes(self) -> dict[str, dict[str, float]]:
        """Return the resources of the nodes that were there when it began, by name."""
        if self._nodes is None:
            self._nodes = dict(self._read())
        return self._nodes

    def devices(self, share: float = 1.0) -> list[str]:
        """Return the GPUs that two actors see, each of which takes a share of one."""
        self.nodes()  # the first line it prints
        assert self.process.stdin is not None
        self.process.stdin.write(f"{share}\n")
        self.process.stdin.flush()
        found: list[str] = self._read()
        return found

    def train(self, file: Path) -> None:
        """Have an actor keep a process that saves to a file, which takes a moment."""
        command = [sys.executable, "-c", SAVER, str(file), "harness.train.worker"]
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        wait_until(lambda: file.exists() and file.read_text() == "trains")

    def end(self) -> tuple[int, str]:
        """Wait for its end; returns its exit status and its standard error."""
        _, said = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, said

    def _read(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("["):  # a line of Ray's own is in colour
                with contextlib.suppress(json.JSONDecodeError):
                    return json.loads(line)
        raise AssertionError(self.end())


def _is_raylet(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.name() == "raylet" and is_running(process)
    return False


def _connections(process: psutil.Process) -> list[Any]:
    with contextlib.suppress(psutil.NoSuchProcess):  # workers come and go
        return list(process.net_connections("tcp"))
    return []
