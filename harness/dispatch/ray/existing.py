"""Tasks on an existing Ray cluster: a KubeRay cluster, a pool of workstations.

The controller that packs Series on the cluster (harness.dispatch.ray.controller) runs there as a Ray job, and the
command returns. Nothing is copied there: the nodes must have the harness installed and see ROOT and the corpus. A small
Ray job inspects the cluster first: whether this is so, and which devices it has.
"""

from __future__ import annotations

import shlex
import uuid
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from harness.common.disk import make_folder
from harness.dispatch.arrays import Array, ArrayStore, new_array, new_name, packed_folder
from harness.dispatch.base import Backend, Handle, Task
from harness.dispatch.ray.job_server import MARK, RayJobs, Seen, python_there
from harness.plan.allocation import Shape, describe_packing
from harness.plan.cluster import Cluster
from harness.plan.plan import PlannedRun
from harness.record.jobs import JobView, SchedulerUnavailable
from harness.record.provenance import installed_version
from harness.record.series import RAY_JOB
from ssmttm.errors import InputError

INSPECT_SECONDS = 300.0
"""Time limit of the inspection job: a node's first job waits until its Python has imported Ray."""
OLDEST_RAY = (2, 60)
SAVE_SECONDS = 120
"""Time that a controller has for its workers to save before Ray kills it."""


class RayCluster(Backend):
    """Runs all tasks in one job of a Ray cluster, packed on its devices."""

    name, scheduler, outlives, is_packed = "ray", "Ray", True, True
    _seen: Cluster | None = None

    @property
    def address(self) -> str:
        """Address of the cluster as the user gave it, or of its job server."""
        return str(self.target.ray_address)

    @property
    def where(self) -> str:
        """Name of the cluster in messages."""
        return f"Ray at {self.address}"

    @cached_property
    def server(self) -> RayJobs:
        """Client of the cluster's job server. Raises SchedulerUnavailable."""
        return RayJobs(self.address)

    def offer(self, places: Mapping[str, Path]) -> Cluster:
        """Inspect the cluster; raises InputError if it cannot be reached, or does not see these paths."""
        if self._seen is None:
            try:
                seen = _inspect(self.server, *(path.absolute() for path in places.values()))
            except SchedulerUnavailable as gone:
                raise InputError(f"--ray-address {gone}") from gone
            check_seen(self.address, seen, places)
            self._seen = cluster_of(self.address, seen)
        return self._seen

    def describe(self, runs: Sequence[PlannedRun]) -> list[str]:
        """Describe how many Runs are packed."""
        return [] if self._seen is None else describe_packing(runs, self._seen, self.where)

    def submit(self, tasks: Sequence[Task], name: str = "") -> list[Handle]:
        """Submit one job that trains all tasks on all nodes of the cluster."""
        assert self._seen is not None
        cluster = self._seen
        a_node = cluster.gpus or cluster.cores
        array = new_array(
            name or new_name(),
            Shape(
                nodes=cluster.nodes,
                ranks=cluster.nodes * a_node,
                threads=max(1, cluster.cores // a_node),
                memory_gib=max(0.5, cluster.memory_gib),
            ),
            tasks,
            packed=True,
            device="GPU" if cluster.gpus else "core",
            ray_address=self.server.server,
        )
        return ArrayStore(self.study_dir).submit(array, self._start)

    def _start(self, array: Array) -> str:
        folder = packed_folder(self.study_dir, array.name)
        make_folder(folder)
        file, log = ArrayStore(self.study_dir).path_of(array), folder / "controller.log"
        command = f"exec >>{shlex.quote(str(log))} 2>&1; " + python_there(
            *("-u", "-m", "harness.dispatch.ray.controller", str(file), array.digest)
        )
        environment = {RAY_JOB: array.name, "RAY_JOB_STOP_WAIT_TIME_S": str(SAVE_SECONDS)}
        self.server.submit(array.name, command, environment)
        return array.name

    def views(self, handles: Sequence[Handle]) -> Mapping[str, JobView]:
        """Ask the job server for these jobs, whose names are their ids."""
        known, asked = self.server.views(), {handle.batch for handle in handles}
        return {name: view for name, view in known.items() if name in asked}

    def cancel(self, handles: Sequence[Handle]) -> None:
        """Ask these jobs to end after their workers have saved."""
        for name in dict.fromkeys(handle.job_id for handle in handles):
            self.server.stop(name)

    def logs(self, handle: Handle) -> list[Path]:
        """Return the log of the controller."""
        return [packed_folder(self.study_dir, handle.batch) / "controller.log"]


def cluster_of(address: str, seen: Seen) -> Cluster:
    """Return the cluster to plan for: its nodes with GPUs if there are any, all taken to be as its weakest."""
    nodes = [node for node in seen.nodes if node.gpus] or [node for node in seen.nodes if node.cores]
    if not nodes:
        raise InputError(f"--ray-address {address}: none of its nodes has a GPU or a CPU core")
    sizes = [node.gpu_memory_gib for node in nodes if node.gpu_memory_gib is not None]
    kinds = {node.gpu_type for node in nodes}
    return Cluster(
        name=address,
        nodes=len(nodes),
        gpus=min(node.gpus for node in nodes),
        cores=max(1, min(node.cores for node in nodes)),
        memory_gib=min(node.memory_gib for node in nodes),
        gpu_memory_gib=min(sizes) if len(sizes) == len(nodes) else None,
        gpu_type=kinds.pop() if len(kinds) == 1 else None,
    )


def _inspect(jobs: RayJobs, written: Path, *read: Path) -> Seen:
    # A file of a unique name tells the folder from another one of the same path. If it does not exist, its parent must.
    there = next(folder for folder in (written, *written.parents) if folder.is_dir())
    mark = there / f".ssmscale-seen-{uuid.uuid4().hex[:8]}"
    name = f"ssmscale-look-{uuid.uuid4().hex[:8]}"
    try:
        mark.touch()
        jobs.submit(
            name, python_there("-m", "harness.dispatch.ray.job_server", str(mark), *map(str, read)), {}
        )
        status, output = jobs.wait(name, INSPECT_SECONDS)
    finally:
        mark.unlink(missing_ok=True)
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["nothing"]
    for line in lines:
        if line.startswith(MARK):
            return Seen.model_validate_json(line.removeprefix(MARK))
    if "No module named" in output:
        package = output.rpartition("No module named")[2].split()[0].strip("'")
        raise jobs.unavailable(f"its Python lacks {package}; install ssmscale[train,ray] on its nodes")
    raise jobs.unavailable(f"the inspection job ended {status}; its output ends: {lines[-1]}")


def check_seen(address: str, seen: Seen, places: Mapping[str, Path]) -> None:
    """Raise InputError if a version on the cluster does not fit, or a node cannot see these paths."""
    (writing, written), *others = ((name, path.absolute()) for name, path in places.items())
    ours = installed_version("ssmscale")
    if seen.ssmscale != ours:
        raise InputError(
            f"--ray-address {address}: has ssmscale {seen.ssmscale}, but {ours} is installed here; install the same "
            "version on both"
        )
    if tuple(map(int, seen.ray.split(".")[:2])) < OLDEST_RAY:
        oldest = ".".join(map(str, OLDEST_RAY))
        raise InputError(f"--ray-address {address}: runs Ray {seen.ray}; {oldest} or later is needed")
    for node in seen.nodes:
        for reading, read in others:
            if str(read) in node.hidden:
                raise InputError(f"{reading}: {read}: node {node.name} of Ray at {address} does not see it")
        if node.hidden:
            raise InputError(
                f"{writing}: {written}: node {node.name} of Ray at {address} does not see it; it must be on shared "
                "storage"
            )
