"""Cores that this process may use, and the cgroups that limit it: quotas of containers and jobs, versions 1 and 2.

A container, an interactive job and a session of systemd have less than the host, which the kernel enforces. A limit of
a cgroup also holds for those below it, so the smallest from the process's own up to the root counts.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc/self")


def usable_cores() -> int:
    """Return the number of cores that this process may use, at least 1."""
    cores = float(os.cpu_count() or 1)
    if hasattr(os, "sched_getaffinity"):
        cores = float(len(os.sched_getaffinity(0)))
    for folder in cgroups("cpu"):
        quota = numbers(folder / "cpu.max") or [
            *numbers(folder / "cpu.cfs_quota_us"),
            *numbers(folder / "cpu.cfs_period_us"),
        ]
        if len(quota) == 2 and min(quota) > 0:  # version 1 has -1 for no quota
            cores = min(cores, quota[0] / quota[1])
    return max(1, int(cores))


def cgroups(controller: str) -> Iterator[Path]:
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


def numbers(path: Path) -> list[int]:
    """Return the numbers in a file of the kernel's; none if one is "max", or there is no such file."""
    try:
        words = path.read_text(encoding="ascii").split()
    except (OSError, UnicodeDecodeError):
        return []
    return [int(word) for word in words] if all(re.fullmatch(r"-?\d+", word) for word in words) else []
