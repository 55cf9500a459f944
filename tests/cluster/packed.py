"""A packed array in one job of the devcluster, with a controller that only writes down what Ray gives it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from harness.common.process import identify_process
from harness.dispatch.arrays import Array, ArrayStore, new_name, packed_folder
from harness.dispatch.base import Task
from harness.dispatch.ray.cluster import RayAddress
from harness.plan.allocation import Shape
from harness.record.root import Launch, Root, read_model_if_there, write_launch, write_run
from slurm.devcluster.cluster import DevCluster
from tests.conftest import REPOSITORY
from tests.harness.journals import registered
from tests.waiting import PATIENCE

CONTROLLER = """\
import json, os, signal, sys, time
from pathlib import Path
import ray

told = []
for number in (signal.SIGTERM, signal.SIGUSR2):
    signal.signal(number, lambda number, _: told.append(signal.Signals(number).name))
folder = Path(sys.argv[1]).parent.parent
if (folder / "breaks").exists():
    sys.exit("ModuleNotFoundError: No module named 'torch'")
ray.init(log_to_driver=False)
signal.signal(signal.SIGTERM, lambda number, _: told.append(signal.Signals(number).name))

def tell(**facts):
    with (folder / "told.jsonl").open("a") as file:
        file.write(json.dumps({"pid": os.getpid(), **facts}) + "\\n")

class Device:
    def name(self):
        return os.environ["CUDA_VISIBLE_DEVICES"]

def offered(nodes):  # names of the GPUs that actors on each node see; None if a node is lost meanwhile
    found = {}
    for node in nodes:
        here = {"num_cpus": 0, "num_gpus": 1, "label_selector": {"ray.io/node-id": node["NodeID"]}}
        devices = [ray.remote(Device).options(**here).remote() for _ in range(int(node["Resources"]["GPU"]))]
        try:
            found[node["NodeName"]] = sorted(ray.get([device.name.remote() for device in devices], timeout=20))
        except (ray.exceptions.RayError, TimeoutError):
            return None
    return found

known, last = None, False
while not told and not last:
    last = (folder / "enough").exists()
    alive = {node["NodeID"]: node for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")}
    if set(alive) != known or last:
        seen = offered(alive.values())
        known = None if seen is None else set(alive)
        if seen:
            tell(offered=seen)
        last = last and seen is not None
    time.sleep(0.1)
if last:
    sys.exit(0)
tell(told=told)
sys.exit(75)
"""


class PackedJob:
    """One study's packed array, submitted."""

    def __init__(
        self, cluster: DevCluster, folder: Path, fields: dict[str, Any], *, nodes: int = 2, gpus: int = 2
    ) -> None:
        self.cluster, self.folder = cluster, folder
        self.root = Root(folder / "runs")
        study = registered(self.root, fields)
        self.study_dir = self.root.study(study.study.name).absolute()
        self.run_dirs = []
        control = self.study_dir / "control.jsonl"
        tasks = []
        for point in study.points:
            self.run_dirs.append(write_run(self.root, point.run).absolute())
            launch = Launch(corpus=Path("corpus"), control=control, dispatcher="ray", micro_batch=1)
            write_launch(self.root, point.series_id, launch)
            tasks.append(Task(series_id=point.series_id, run_dirs=(self.run_dirs[-1],), ranks=1, threads=1))
        self.array = Array(
            name=new_name(),
            shape=Shape(nodes=nodes, ranks=nodes * gpus, threads=1, memory_gib=2),
            tasks=tuple(tasks),
            packed=True,
            process=identify_process(),
            t=time.time(),
        )
        ArrayStore(self.study_dir).write(self.array)
        self.job_id = ""

    def submit(self, *options: str) -> None:
        array_file = self.study_dir / "arrays" / f"{self.array.name}.json"
        controller = self.folder / "controller.py"
        controller.write_text(CONTROLLER)
        program = (
            "import sys; from harness.dispatch.ray.pilot import main; "
            f"sys.exit(main([{str(array_file)!r}], [{str(controller)!r}]))"
        )
        script = self.folder / "job.sh"
        script.write_text(f'#!/bin/bash\nexec {sys.executable} -u -c "{program}"\n')
        shape = self.array.shape
        said = self.slurm(
            *("sbatch", "--parsable", "--array=0", "--partition=low", "--requeue", "--open-mode=append"),
            *(f"--job-name={self.array.name}", f"--nodes={shape.nodes}", "--mem=2G", "--signal=B:USR2@20"),
            *(f"--gpus-per-node={shape.ranks_a_node}", f"--ntasks-per-node={shape.ranks_a_node}"),
            *("--cpus-per-task=1", f"--output={self.folder}/job.out", *options, str(script)),
        )
        self.job_id = f"{said.split(';')[0].strip()}_0"

    def slurm(self, *command: str, check: bool = True) -> str:
        environment = {
            **os.environ,
            **self.cluster.env,
            "PYTHONPATH": str(REPOSITORY),
            "SSMSCALE_OF_TEST": self.array.name,
        }
        return subprocess.run(
            command, capture_output=True, text=True, env=environment, check=check, timeout=PATIENCE
        ).stdout

    def cancel(self) -> None:
        """Cancel its job, which may have ended long ago."""
        if self.job_id:
            self.slurm("scancel", self.job_id, check=False)

    def state(self) -> str:
        """Return SLURM's state of its job; "" after it has left the queue."""
        lines = self.slurm("squeue", "--noheader", "--array", "--format=%i %T").splitlines()
        return dict(line.split() for line in lines).get(self.job_id, "")

    @property
    def address(self) -> RayAddress | None:
        """Address of its Ray while that runs."""
        return read_model_if_there(packed_folder(self.study_dir, self.array.name) / "ray.json", RayAddress)

    @property
    def out(self) -> str:
        """Output of its batch script."""
        return text_of(self.folder / "job.out")

    def told(self, key: str) -> list[Any]:
        """Return the facts of one kind that its controllers wrote down, oldest first."""
        return [facts[key] for facts in self._facts() if key in facts]

    def controllers(self) -> list[int]:
        """Return the process ids of its controllers, oldest first."""
        return list(dict.fromkeys(facts["pid"] for facts in self._facts()))

    def processes(self) -> list[psutil.Process]:
        """Return its processes on all nodes."""
        return [
            process
            for process in psutil.process_iter(["environ"])
            if (process.info["environ"] or {}).get("SSMSCALE_OF_TEST") == self.array.name
        ]

    def named(self, name: str) -> list[psutil.Process]:
        """Return its processes of that name."""
        return [process for process in self.processes() if name_of(process) == name]

    def _facts(self) -> Sequence[dict[str, Any]]:
        lines = text_of(self.study_dir / "told.jsonl").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]


def text_of(file: Path) -> str:
    return file.read_text() if file.exists() else ""


def name_of(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""
