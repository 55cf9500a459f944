"""Tasks on a Ray cluster that is there already: a KubeRay cluster, a pool of workstations.

The controller that packs Series on the cluster (harness.dispatch.ray.controller) runs there as a Ray job, and the
command returns. Nothing is copied there: the cluster's nodes have the harness installed and see the run directories
and the corpus. A small job looks first whether that is so, and what there is to plan with.
"""

from __future__ import annotations

import shlex
import uuid
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from harness.dispatch.arrays import Array, ArrayStore, new_array, new_name, packed_folder
from harness.dispatch.base import Backend, Handle, Task
from harness.dispatch.ray.job_server import MARK, RayJobs, Seen, python_there, ray_unavailable
from harness.plan.allocation import Shape, describe_packing
from harness.plan.cluster import Cluster
from harness.plan.plan import PlannedRun
from harness.record.jobs import JobView, SchedulerUnavailable
from harness.record.provenance import installed_version
from harness.record.registry import ResolvedStudy
from harness.record.series import RAY_JOB
from ssmttm.errors import InputError

LOOK_SECONDS = 300.0
"""How long the job that looks around may take: a node's first job waits for its Python to import Ray."""
OLDEST_RAY = (2, 60)
SAVE_SECONDS = 120
"""How long a controller that is told to stop may take before Ray kills it: its workers save meanwhile."""


class RayCluster(Backend):
    """All tasks in one job of a Ray cluster, packed on its devices."""

    name, scheduler, outlives, is_packed = "ray", "Ray", True, True
    _seen: Cluster | None = None

    @property
    def address(self) -> str:
        """The user's address of the cluster, or that of its job server."""
        return str(self.target.ray_address)

    @property
    def where(self) -> str:
        """The cluster, as a user knows it."""
        return f"Ray at {self.address}"

    @cached_property
    def server(self) -> RayJobs:
        """The cluster's job server. Raises SchedulerUnavailable."""
        return RayJobs(self.address)

    def offer(self, resolved: ResolvedStudy) -> Cluster:
        """Look at the cluster from within; raises InputError where it cannot be reached, or cannot train the study."""
        if self._seen is None:
            root, corpus = resolved.root.path.absolute(), resolved.study.corpus.path.absolute()
            try:
                seen = _look(self.server, root, corpus)
            except SchedulerUnavailable as gone:
                raise InputError(f"--ray-address {gone}") from gone
            check_seen(self.address, seen, root, corpus)
            self._seen = cluster_of(self.address, seen)
        return self._seen

    def describe(self, runs: Sequence[PlannedRun]) -> list[str]:
        """Say how many Runs are packed."""
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
        folder.mkdir(parents=True, exist_ok=True)
        file, log = ArrayStore(self.study_dir).path_of(array), folder / "controller.log"
        command = f"exec >>{shlex.quote(str(log))} 2>&1; " + python_there(
            "-u", "-m", "harness.dispatch.ray.controller", str(file)
        )
        environment = {RAY_JOB: array.name, "RAY_JOB_STOP_WAIT_TIME_S": str(SAVE_SECONDS)}
        self.server.submit(array.name, command, environment)
        return array.name

    def views(self, handles: Sequence[Handle]) -> Mapping[str, JobView]:
        """Ask the job server for these jobs, whose names are their ids."""
        known, asked = self.server.views(), {handle.batch for handle in handles}
        return {name: view for name, view in known.items() if name in asked}

    def cancel(self, handles: Sequence[Handle]) -> None:
        """Ask these jobs to save and end."""
        for name in dict.fromkeys(handle.job_id for handle in handles):
            self.server.stop(name)

    def logs(self, handle: Handle) -> list[Path]:
        """Return the log of the controller."""
        return [packed_folder(self.study_dir, handle.batch) / "controller.log"]


def cluster_of(address: str, seen: Seen) -> Cluster:
    """What planning needs of what was seen: the nodes with GPUs where there are any, each as its weakest."""
    nodes = [node for node in seen.nodes if node.gpus] or [node for node in seen.nodes if node.cores]
    if not nodes:
        raise InputError(f"--ray-address {address}: no node of it offers a GPU or a CPU core")
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


def _look(jobs: RayJobs, root: Path, corpus: Path) -> Seen:
    # Another folder of the same name would not have it. Where ROOT is not there yet, who sees its parent will see it.
    there = next(folder for folder in (root, *root.parents) if folder.is_dir())
    mark = there / f".ssmscale-seen-{uuid.uuid4().hex[:8]}"
    name = f"ssmscale-look-{uuid.uuid4().hex[:8]}"
    try:
        mark.touch()
        jobs.submit(name, python_there("-m", "harness.dispatch.ray.job_server", str(mark), str(corpus)), {})
        ended = jobs.wait(name, LOOK_SECONDS)
    finally:
        mark.unlink(missing_ok=True)
    if ended is None:
        raise ray_unavailable(
            f"{jobs.address}: a job that looks around has not ended for {LOOK_SECONDS:.0f} s"
        )
    for line in ended.output.splitlines():
        if line.startswith(MARK):
            return Seen.model_validate_json(line.removeprefix(MARK))
    if "No module named" in ended.output:
        package = ended.output.rpartition("No module named")[2].split()[0].strip("'")
        raise ray_unavailable(
            f"{jobs.address}: its Python lacks {package}; install ssmscale[train,ray] on its nodes"
        )
    said = [line for line in ended.output.splitlines() if line.strip()] or ["nothing"]
    raise ray_unavailable(
        f"{jobs.address}: a job that looks around ended {ended.status}, saying {said[-1].strip()}"
    )


def check_seen(address: str, seen: Seen, root: Path, corpus: Path) -> None:
    """Raise InputError where the versions there are not ours, or a node does not see what it is to read and write."""
    ours = installed_version("ssmscale")
    if seen.ssmscale != ours:
        raise InputError(
            f"--ray-address {address}: has ssmscale {seen.ssmscale}, and here it is {ours}; install the same on both"
        )
    if tuple(map(int, seen.ray.split(".")[:2])) < OLDEST_RAY:
        oldest = ".".join(map(str, OLDEST_RAY))
        raise InputError(f"--ray-address {address}: runs Ray {seen.ray}; it takes {oldest} or later")
    for node in seen.nodes:
        if str(corpus) in node.hidden:
            raise InputError(f"corpus.path: {corpus}: is not seen on node {node.name} of Ray at {address}")
        if node.hidden:
            raise InputError(
                f"--root: {root}: node {node.name} of Ray at {address} does not see it; it must be on shared storage"
            )
