"""Which process is meant: one identity for as long as the machine is up, whatever is done to its clock.

A process's time of birth, as clocks tell it, moves when the clock is set. The kernel counts in ticks since it
started, and names that start; where there is no such kernel (macOS) the time of birth has to do.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

BOOT = Path("/proc/sys/kernel/random/boot_id")


def identify_process() -> dict[str, Any]:
    """What tells this process from any other, on this host and others, before and after a restart."""
    identity: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid()}
    facts = _kernel_facts(os.getpid())
    if facts is None:
        return {**identity, "process_started": psutil.Process().create_time()}
    return {**identity, "boot_id": _boot_id(), "started_ticks": facts[1]}


def process_is_alive(identity: Mapping[str, Any]) -> bool:
    """Whether a process that said `identify_process` still runs; of other hosts' processes that is never known."""
    if identity.get("host") != socket.gethostname():
        return False
    pid = identity.get("pid", 0)
    if "started_ticks" in identity:
        facts = _kernel_facts(pid)
        return (
            facts is not None
            and facts == (facts[0], identity["started_ticks"])
            and facts[0] not in {"Z", "X"}  # ended, and not yet waited for
            and identity.get("boot_id") == _boot_id()
        )
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - identity["process_started"]) < 1.0
        return same and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, KeyError, ValueError, OverflowError):
        return False


def _kernel_facts(pid: int) -> tuple[str, int] | None:
    """State and time of birth in ticks of a process of this machine's Linux kernel; None without one."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may hold anything
    return fields[0], int(fields[19])


def _boot_id() -> str | None:
    try:
        return BOOT.read_text(encoding="ascii").strip()
    except OSError:
        return None
