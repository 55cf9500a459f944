"""Memory and cores that this process may use: what cgroups, ulimit and SLURM leave it of the machine.

A container, an interactive job and a session of systemd have less than the host, which the kernel enforces by ending
processes. A limit of a cgroup also holds for those below it, so the smallest from the process's own up to the root
counts.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
from collections.abc import Iterator
from pathlib import Path

import psutil

PROC = Path("/proc/self")


def usable_memory() -> int:
    """Return the bytes of memory that this process and its children may use together."""
    limits = [psutil.virtual_memory().total, *_ulimits(), *_of_allocation()]
    for folder in _cgroups("memory"):
        # An absent limit is "max" in version 2, and in version 1 a number beyond any machine's memory.
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
            limits += _numbers(folder / name)
    return min(limit for limit in limits if limit > 0)


def usable_cores() -> int:
    """Return the number of cores that this process may use, at least 1."""
    cores = float(len(os.sched_getaffinity(0)))
    for folder in _cgroups("cpu"):
        quota = _numbers(folder / "cpu.max") or [
            *_numbers(folder / "cpu.cfs_quota_us"),
            *_numbers(folder / "cpu.cfs_period_us"),
        ]
        if len(quota) == 2 and min(quota) > 0:  # version 1 has -1 for no quota
            cores = min(cores, quota[0] / quota[1])
    return max(1, int(cores))


def oom_kills() -> int:
    """Return a number that grows when the kernel kills a process of this process's cgroups for memory.

    Those above its own count: the ranks of a SLURM job are in a step of their own, beside that of the batch script.
    """
    kills = 0
    for folder in _cgroups("memory"):
        for name in ("memory.events", "memory.oom_control"):
            with contextlib.suppress(OSError):
                text = (folder / name).read_text(encoding="ascii")
                kills += sum(map(int, re.findall(r"^oom_kill (\d+)$", text, re.MULTILINE)))
    return kills


def _cgroups(controller: str) -> Iterator[Path]:
    """Yield the folders of this process's cgroups that control it, each followed by those above it."""
    with contextlib.suppress(OSError):
        mounts = [line.split() for line in (PROC / "mountinfo").read_text("utf-8", "replace").splitlines()]
        for line in (PROC / "cgroup").read_text("utf-8", "replace").splitlines():
            _, controllers, own = line.split(":", maxsplit=2)
            if controllers and controller not in controllers.split(","):
                continue
            for words in mounts:
                kind, options = words[words.index("-") + 1], words[-1].split(",")
                if kind == ("cgroup" if controllers else "cgroup2") and (
                    not controllers or controller in options
                ):
                    yield from _upwards(Path(words[4]), words[3], own)


def _upwards(mount: Path, root: str, own: str) -> Iterator[Path]:
    """Yield the folder of a cgroup and those above it, below a mount of the cgroup `root`.

    In a container the mount often begins at the container's own cgroup, of which /proc may give the host's path.
    """
    inner = own.removeprefix(root) if own == root or own.startswith(root.rstrip("/") + "/") else "/"
    folder = mount / inner.lstrip("/")
    if ".." in folder.parts or not folder.is_dir():
        folder = mount
    yield folder
    yield from (above for above in folder.parents if above.is_relative_to(mount))


def _ulimits() -> Iterator[int]:
    for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY:
            yield limit


def _of_allocation() -> Iterator[int]:
    """Yield the memory of this node in an allocation of SLURM, which has it in MiB; 0 stands for all."""
    if "SLURM_JOB_ID" not in os.environ:
        return
    cores = os.environ.get("SLURM_CPUS_ON_NODE", "1")
    for name, factor in (("SLURM_MEM_PER_NODE", "1"), ("SLURM_MEM_PER_CPU", cores)):
        value = os.environ.get(name, "")
        if value.isdigit() and factor.isdigit():
            yield int(value) * int(factor) * 2**20


def _numbers(path: Path) -> list[int]:
    """Return the numbers in a file of the kernel's; none if one is "max", or there is no such file."""
    try:
        words = path.read_text(encoding="ascii").split()
    except (OSError, UnicodeDecodeError):
        return []
    return [int(word) for word in words] if all(re.fullmatch(r"-?\d+", word) for word in words) else []
