"""Checks of a cluster from this machine: its profile, SLURM's programs, and the paths that jobs need on nodes."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

import psutil

from harness.common.format import GIB
from harness.common.gpus import VISIBLE, read_gpus
from harness.common.validation import first_line
from harness.doctor.container import examine_container
from harness.doctor.machine import Finding
from harness.doctor.slurm import examine_slurm
from harness.plan.cluster import Profile, load_profile
from harness.plan.peaks import peak_flops
from harness.record.nodes import remembered
from harness.record.provenance import HOME
from harness.record.root import Root
from harness.study.run import Precision
from harness.tracking.store import connect
from ssmttm.errors import InputError

PROGRAMS = {
    "sbatch": "submits jobs",
    "squeue": "shows the states of jobs",
    "scancel": "cancels jobs",
    "scontrol": "requeues jobs",
    "sinfo": "describes partitions",
    "srun": "starts the ranks of jobs",
}
OPTIONAL = {
    "sacct": "without it `status` uses squeue and the journals",
    "rsync": "without it --snapshot cannot copy the code",
}
SHARED = re.compile(
    r"9p|afs|beegfs|ceph|cephfs|cifs|fhgfs|gfs2|glusterfs|gpfs|juicefs|lustre|nfs|nfs4|ocfs2|orangefs|panfs|pvfs2|smb3|"
    r"smbfs|sshfs|virtiofs|wekafs"
)
"""File systems that several machines can see, by type in the kernel's table of mounts."""


def examine_cluster(cluster: str, root: Path) -> Iterator[Finding]:
    """Check all that a submission to a cluster needs; `cluster` is the value of --cluster."""
    for program, meaning in (PROGRAMS | OPTIONAL).items():
        yield _program(program, meaning, needed=program in PROGRAMS)
    try:
        profile = load_profile(cluster)
    except InputError as error:
        remedy = "correct it (slurm/README.md lists the keys); no other check was made"
        yield Finding.of("profile", str(error), remedy, needed=True)
        return
    yield Finding.of("profile", f"{cluster} is {profile.name}")
    yield setup_lines(profile)
    if profile.gpus:
        yield gpus_of_node(profile)
    yield from examine_container(profile)
    yield from examine_slurm(profile)
    yield bad_nodes(root)
    yield location("root on the nodes", root, profile, "choose --root on a file system that all nodes see")
    remedy = "install the harness and its environment on a file system that all nodes see"
    yield location("python of the jobs", Path(sys.executable), profile, remedy)
    yield location("code of the jobs", HOME, profile, remedy)
    yield tracker(os.environ.get("MLFLOW_TRACKING_URI"))


def gpus_of_node(profile: Profile) -> Finding:
    """Compare the GPUs of this node with the profile, in a job; elsewhere say how to start one that does."""
    name = "GPUs of a node"
    if "SLURM_JOB_ID" not in os.environ:
        command = f"srun --partition={next(iter(profile.partitions))} --gpus=1 ssmscale doctor --cluster {profile.name}"
        return Finding.of(name, f"this is no node of a job; their driver and torch are checked by: {command}")
    found = read_gpus()
    if not found.devices:
        why = found.problem or f"{VISIBLE}={os.environ.get(VISIBLE)!r} hides them"
        return Finding.of(name, f"{found}: {why}", "ask for GPUs in the job that runs the doctor")
    gpu, problems = found.devices[0], []
    known, planned = peak_flops(gpu.name, Precision.BF16), profile.cluster().peak(Precision.BF16)
    if profile.gpu_memory_gib and gpu.memory and gpu.memory / GIB < 0.99 * profile.gpu_memory_gib:
        problems.append(f"gpu_memory_gib: {gpu.memory / GIB:.1f}")
    if known and not planned:
        problems.append(f"peak_flops: {{bf16: {known:.3g}}}")
    elif known and planned and not 0.8 < planned / known < 1.25:
        problems.append(f"peak_flops: {{bf16: {known:.3g}}} and not {planned:.3g}")
    remedy = f"set in the profile {'; '.join(problems)}" if problems else None
    return Finding.of(name, str(found), remedy)


def bad_nodes(root: Path) -> Finding:
    """Look for nodes that failed under a study's Runs, which its jobs avoid."""
    name, held = "bad nodes", remembered(Root(root))
    if not held:
        return Finding.of(name, f"no study under {root} avoids a node")
    found = "; ".join(f"{study}: {', '.join(map(str, nodes.values()))}" for study, nodes in held.items())
    remedy = f"once one is repaired: ssmscale doctor --root {shlex.quote(str(root))} --forget-node NODE"
    return Finding.of(name, found, remedy)


def setup_lines(profile: Profile) -> Finding:
    """Check the syntax of the shell lines a job begins with, without running them."""
    lines = "\n".join(profile.setup) + "\n"
    done = subprocess.run(["/bin/bash", "-n"], input=lines, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return Finding.of("setup lines", f"{len(profile.setup)} that bash can read", needed=True)
    errors = "; ".join(done.stderr.strip().splitlines())
    return Finding.of("setup lines", errors, "correct the lines of setup in the profile", needed=True)


def location(name: str, path: Path, profile: Profile, remedy: str) -> Finding:
    """Check that nodes see a path: it is in a directory that the profile shares, or on a network file system."""
    try:
        profile.check_shared(name, path)
    except InputError as error:
        return Finding.of(name, str(error), remedy, needed=True)
    kind = file_system(path)
    if profile.shared:
        return Finding.of(name, f"{path}: shared, as the profile says ({kind})")
    if SHARED.fullmatch(kind.removeprefix("fuse.")):
        return Finding.of(name, f"{path}: on {kind}, which other machines can see")
    found, remedy = f"{path}: on {kind}, a local disk", f"{remedy}, unless this machine is the whole cluster"
    return Finding.of(name, found, remedy)


def file_system(path: Path) -> str:
    """Return the type of the file system a path is or would be on."""
    real = Path(os.path.realpath(path))
    mounts = [
        (len(Path(part.mountpoint).parts), part.fstype)
        for part in psutil.disk_partitions(all=True)
        if real.is_relative_to(part.mountpoint)
    ]
    return max(enumerate(mounts), key=lambda mount: (mount[1][0], mount[0]))[1][1] if mounts else "unknown"


def tracker(uri: str | None) -> Finding:
    """Check that jobs can send to the default tracker, which a study without its own would use."""
    name = "tracker for jobs"
    parts = urlsplit(uri or "")
    if parts.scheme not in {"http", "https"}:
        found = "none on a server: jobs write journals, and `ssmscale sync STUDY` brings them to MLflow"
        return Finding.of(name, found)
    address = f"{parts.scheme}://{parts.hostname}:{parts.port or (443 if parts.scheme == 'https' else 80)}"
    if parts.hostname in {"localhost", "127.0.0.1", "::1"}:
        found = f"{address} is visible on this machine only"
        remedy = (
            "`ssmscale serve STUDY --host 0.0.0.0`, and export the lines it prints, unless all nodes are here"
        )
        return Finding.of(name, found, remedy)
    problem = _problem(f"{address}{parts.path.rstrip('/')}/health")
    if problem is None and (refusal := _refusal(str(uri))) is None:
        return Finding.of(name, f"{address} answers")
    if problem is None:
        remedy = (
            "export MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, as `ssmscale serve` prints them"
        )
        return Finding.of(name, f"{address} refuses what jobs send: {refusal}", remedy)
    remedy = "`ssmscale serve STUDY`, or correct MLFLOW_TRACKING_URI; `ssmscale sync STUDY` sends the jobs' journals"
    return Finding.of(name, f"{address} does not answer: {problem}", remedy)


def _problem(url: str) -> str | None:
    from urllib.request import urlopen

    try:
        with urlopen(url, timeout=20):  # noqa: S310 - the scheme is http or https
            return None
    except HTTPError as error:  # a proxy may ask for a login here too
        return None if error.code == 401 else str(error)
    except (URLError, OSError, ValueError) as error:
        return str(getattr(error, "reason", error))


def _refusal(uri: str) -> str | None:
    """Return what a tracker answers to a client with this environment's login, if that is a refusal."""
    try:
        connect(uri).search_experiments(max_results=1)
    except ModuleNotFoundError:  # MLflow's client is found missing elsewhere
        return None
    except Exception as error:  # each kind of transport has its own exceptions
        return first_line(error, urlsplit(uri).password)
    return None


def _program(name: str, meaning: str, *, needed: bool) -> Finding:
    if path := shutil.which(name):
        return Finding.of(name, f"{path}: {meaning}" if needed else path, needed=needed)
    remedy = "load SLURM's module, or run this on a login node" if needed else f"install it; {meaning}"
    return Finding.of(name, "not found", remedy, needed=needed)
