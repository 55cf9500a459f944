"""Submitting to a Ray cluster that is there already: a KubeRay cluster, a pool of workstations.

The controller that packs Series on the cluster (harness.dispatch.ray.controller) runs there as a Ray job, and the
command returns. Nothing is copied there: the cluster's nodes have the harness installed and see the run directories
and the corpus. A small job looks first whether that is so, and what there is to plan with.
"""

from __future__ import annotations

import shlex
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from harness.common.process import identify_process
from harness.dispatch.arrays import Array, ArrayBook, packed_folder
from harness.dispatch.ray.job_server import MARK, RayGone, RayJobs, Seen, python_there
from harness.dispatch.slurm.sbatch import new_name, task_of
from harness.plan.allocation import Shape
from harness.plan.cluster import Cluster
from harness.plan.plan import Plan
from harness.record.provenance import installed_version
from harness.record.registry import ResolvedStudy
from harness.record.series import RAY_JOB
from harness.submit.claims import Claims
from harness.submit.slurm import Submitted, names_of, tell_scheduled
from harness.submit.submission import Submission
from ssmttm.errors import InputError

LOOK_SECONDS = 300.0
"""How long the job that looks around may take: a node's first job waits for its Python to import Ray."""
OLDEST_RAY = (2, 60)
SAVE_SECONDS = 120
"""How long a controller that is told to stop may take before Ray kills it: its workers save meanwhile."""


@dataclass(frozen=True)
class RayCluster:
    """A Ray cluster that was looked at."""

    jobs: RayJobs
    cluster: Cluster
    """What planning needs of it."""


def look_at(address: str, resolved: ResolvedStudy) -> RayCluster:
    """Look at a cluster from within; raises InputError where it cannot be reached, or cannot train the study."""
    root, corpus = resolved.root.path.absolute(), resolved.study.corpus.path.absolute()
    try:
        jobs = RayJobs(address)
        seen = _look(jobs, root, corpus)
    except RayGone as gone:
        raise InputError(f"--ray-address {gone}") from gone
    check_seen(address, seen, root, corpus)
    return RayCluster(jobs, cluster_of(address, seen))


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


def submit_to_ray(resolved: ResolvedStudy, plan: Plan, there: RayCluster) -> Submitted:
    """Hand over the Series that are missing and that nobody has claimed, all in one job. Raises RayGone."""
    submission = Submission(resolved, plan, None, "ray")
    jobs = submission.prepare([run.status for run in plan.missing])
    name = new_name()
    ours = Claims(resolved.root).take_all(resolved.study.name, name, jobs)
    if not ours:
        return Submitted(taken=len(jobs))
    submission.launch(ours)
    cluster, study_dir = there.cluster, resolved.root.study(resolved.study.name).absolute()
    a_node = cluster.gpus or cluster.cores
    array = Array(
        name=name,
        shape=Shape(
            nodes=cluster.nodes,
            ranks=cluster.nodes * a_node,
            threads=max(1, cluster.cores // a_node),
            memory_gib=max(0.5, cluster.memory_gib),
        ),
        tasks=tuple(map(task_of, ours)),
        packed=True,
        device="GPU" if cluster.gpus else "core",
        ray_address=there.jobs.server,
        process=identify_process(),
        t=time.time(),
    )
    book = ArrayBook(study_dir)
    book.write(array)
    folder = packed_folder(study_dir, name)
    folder.mkdir(parents=True, exist_ok=True)
    file, log = book.folder / f"{name}.json", folder / "controller.log"
    command = f"exec >>{shlex.quote(str(log))} 2>&1; " + python_there(
        "-u", "-m", "harness.dispatch.ray.controller", str(file)
    )
    try:
        there.jobs.submit(name, command, {RAY_JOB: name, "RAY_JOB_STOP_WAIT_TIME_S": str(SAVE_SECONDS)})
    except RayGone:  # whoever looks next asks Ray by its name
        book.write(array.model_copy(update={"process": {**array.process, "pid": 0}}))
        raise
    book.write(array.model_copy(update={"job_id": name}))
    names = names_of(ours)
    tell_scheduled(submission, names, name, "ray", ray_address=there.jobs.address)
    return Submitted(len(names), len(ours), (name,), len(jobs) - len(ours), is_packed=True)


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
        raise RayGone(f"{jobs.address}: a job that looks around has not ended for {LOOK_SECONDS:.0f} s")
    for line in ended.output.splitlines():
        if line.startswith(MARK):
            return Seen.model_validate_json(line.removeprefix(MARK))
    if "No module named" in ended.output:
        package = ended.output.rpartition("No module named")[2].split()[0].strip("'")
        raise RayGone(f"{jobs.address}: its Python lacks {package}; install ssmscale[train,ray] on its nodes")
    said = [line for line in ended.output.splitlines() if line.strip()] or ["nothing"]
    raise RayGone(f"{jobs.address}: a job that looks around ended {ended.status}, saying {said[-1].strip()}")


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
