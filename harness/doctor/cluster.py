"""Checks of a cluster from here: its profile, SLURM's programs and answers, and the paths that jobs need on nodes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

import psutil

from harness.doctor.machine import Finding
from harness.doctor.slurm import examine_slurm
from harness.plan.cluster import Profile, load_profile
from harness.record.provenance import HOME
from ssmttm.errors import InputError

PROGRAMS = {
    "sbatch": "jobs are submitted with it",
    "squeue": "status asks it",
    "scancel": "cancel uses it",
    "scontrol": "jobs are requeued with it",
    "sinfo": "partitions are checked with it",
    "srun": "jobs start their ranks with it",
}
OPTIONAL = {
    "sacct": "without it status goes by squeue and the journals",
    "rsync": "without it code cannot be copied for --snapshot",
}
SHARED = frozenset(
    {
        "9p",
        "afs",
        "beegfs",
        "ceph",
        "cephfs",
        "cifs",
        "fhgfs",
        "gfs2",
        "glusterfs",
        "gpfs",
        "juicefs",
        "lustre",
        "nfs",
        "nfs4",
        "ocfs2",
        "orangefs",
        "panfs",
        "pvfs2",
        "smb3",
        "smbfs",
        "sshfs",
        "virtiofs",
        "wekafs",
    }
)
"""File systems that several machines see, by their types' names in the kernel's table of mounts."""
SECONDS = 20.0
"""Time for the tracker to answer."""


def examine_cluster(cluster: str, root: Path) -> Iterator[Finding]:
    """Try everything that a submission to this cluster would need; `cluster` is as --cluster takes it."""
    for program, meaning in (PROGRAMS | OPTIONAL).items():
        yield _program(program, meaning, needed=program in PROGRAMS)
    try:
        profile = load_profile(cluster)
    except InputError as error:
        remedy = "correct it (slurm/README.md lists the keys); the rest was not asked"
        yield Finding(name="profile", works=False, needed=True, found=str(error), remedy=remedy)
        return
    yield Finding(name="profile", works=True, found=f"{cluster} is {profile.name}")
    yield setup_lines(profile)
    yield from examine_slurm(profile)
    yield place("root on the nodes", root, profile, "choose --root on a file system that all nodes see")
    remedy = "install the harness and its environment on a file system that all nodes see"
    yield place("python of the jobs", Path(sys.executable), profile, remedy)
    yield place("code of the jobs", HOME, profile, remedy)
    yield tracker(os.environ.get("MLFLOW_TRACKING_URI"))


def setup_lines(profile: Profile) -> Finding:
    """Check that the lines a job begins with are shell; they are read and not run."""
    lines = "\n".join(profile.setup) + "\n"
    done = subprocess.run(["/bin/bash", "-n"], input=lines, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        found = f"{len(profile.setup)} that bash can read"
        return Finding(name="setup lines", works=True, needed=True, found=found)
    found, remedy = "; ".join(done.stderr.strip().splitlines()), "correct the lines of setup in the profile"
    return Finding(name="setup lines", works=False, needed=True, found=found, remedy=remedy)


def place(name: str, path: Path, profile: Profile, remedy: str) -> Finding:
    """Check that nodes see a path: it lies in a directory the profile calls shared, or on a network's file system."""
    try:
        profile.check_shared(name, path)
    except InputError as error:
        return Finding(name=name, works=False, needed=True, found=str(error), remedy=remedy)
    kind = file_system(path)
    if profile.shared:
        return Finding(name=name, works=True, found=f"{path}: shared, as the profile says ({kind})")
    if kind.removeprefix("fuse.") in SHARED:
        return Finding(name=name, works=True, found=f"{path}: on {kind}, which other machines may see")
    found, remedy = (
        f"{path}: on {kind}, which is this machine alone",
        f"{remedy}, unless this machine is the cluster",
    )
    return Finding(name=name, works=False, found=found, remedy=remedy)


def file_system(path: Path) -> str:
    """Type of the file system a path is or would be on."""
    real = Path(os.path.realpath(path))
    mounts = [
        (len(Path(part.mountpoint).parts), part.fstype)
        for part in psutil.disk_partitions(all=True)
        if real.is_relative_to(part.mountpoint)
    ]
    return max(enumerate(mounts), key=lambda mount: (mount[1][0], mount[0]))[1][1] if mounts else "unknown"


def tracker(uri: str | None) -> Finding:
    """Check that jobs can send to the tracker that a study without one of its own would use."""
    name = "tracker for jobs"
    if uri is None or urlsplit(uri).scheme not in {"http", "https"}:
        found = "none that other machines may write to: jobs keep journals, and `ssmscale sync` brings them to MLflow"
        return Finding(name=name, works=True, found=found)
    parts = urlsplit(uri)
    address = f"{parts.scheme}://{parts.hostname}:{parts.port or (443 if parts.scheme == 'https' else 80)}"
    if parts.hostname in {"localhost", "127.0.0.1", "::1"}:
        found = f"{address} is this machine alone"
        remedy = "start `ssmscale serve` with --host 0.0.0.0 and export the lines it prints, unless all nodes are here"
        return Finding(name=name, works=False, found=found, remedy=remedy)
    problem = _refusal(f"{address}{parts.path.rstrip('/')}/health")
    if problem is None:
        return Finding(name=name, works=True, found=f"{address} answers")
    remedy = "start `ssmscale serve`, or correct MLFLOW_TRACKING_URI; jobs keep journals and `ssmscale sync` catches up"
    return Finding(name=name, works=False, found=f"{address} does not answer: {problem}", remedy=remedy)


def _refusal(url: str) -> str | None:
    from urllib.request import urlopen

    try:
        with urlopen(url, timeout=SECONDS):  # noqa: S310 - http or https, as was seen
            return None
    except HTTPError as error:  # a server that asks for a password is there
        return None if error.code == 401 else str(error)
    except (URLError, OSError, ValueError) as error:
        return str(getattr(error, "reason", error))


def _program(name: str, meaning: str, *, needed: bool) -> Finding:
    path = shutil.which(name)
    if path is not None:
        return Finding(name=name, works=True, needed=needed, found=f"{path}: {meaning}" if needed else path)
    remedy = (
        "load the site's SLURM module, or run this on a login node" if needed else f"install it; {meaning}"
    )
    return Finding(name=name, works=False, needed=needed, found="not found", remedy=remedy)
