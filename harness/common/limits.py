"""Memory that this process may use: what cgroups, ulimit and SLURM leave it of the machine.

The kernel ends processes that take more. The cores stand in ssmttm.limits, since builds of corpora count them too.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
from collections.abc import Iterator

import psutil

from ssmttm.limits import cgroups, numbers


def usable_memory() -> int:
    """Return the bytes of memory that this process and its children may use together."""
    limits = [psutil.virtual_memory().total, *_ulimits(), *_of_allocation()]
    for folder in cgroups("memory"):
        # An absent limit is "max" in version 2, and in version 1 a number beyond any machine's memory.
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
            limits += numbers(folder / name)
    return min(limit for limit in limits if limit > 0)


def oom_kills() -> int:
    """Return a number that grows when the kernel kills a process of this process's cgroups for memory.

    Those above its own count: the ranks of a SLURM job are in a step of their own, beside that of the batch script.
    """
    kills = 0
    for folder in cgroups("memory"):
        for name in ("memory.events", "memory.oom_control"):
            with contextlib.suppress(OSError):
                text = (folder / name).read_text(encoding="ascii")
                kills += sum(map(int, re.findall(r"^oom_kill (\d+)$", text, re.MULTILINE)))
    return kills


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
