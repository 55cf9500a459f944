"""Choose for a Ray node on this host its address, its GPUs, its ports and a folder for its sockets."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import secrets
import shutil
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness.record.jobs import SchedulerUnavailable

LOOPBACK = "127.0.0.1"
HELD = "held"
"""Name of the file in a temporary folder that its owner keeps locked."""
LOWEST_PORT = 10000
EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


class RayDown(SchedulerUnavailable):
    """Ray did not start, or has ended; the message says why."""

    def __init__(self, why: str) -> None:
        super().__init__("Ray", why)


def address_towards(others: Sequence[str]) -> str:
    """Return the address by which other hosts reach this one, or the loopback address if all of them are this host.

    Raises RayDown if the name of a host is unknown here.
    """
    for other in others:
        try:
            kind, _, _, _, place = socket.getaddrinfo(other, 9, type=socket.SOCK_DGRAM)[0]
        except OSError as error:
            raise RayDown(f"{other}: host {os.uname().nodename} does not know this name") from error
        with socket.socket(kind, socket.SOCK_DGRAM) as trial:
            trial.connect(place)  # sends nothing
            address = str(trial.getsockname()[0])
        if not address.startswith("127.") and address != "::1":
            return address
    return LOOPBACK


def offered_gpus(environment: Mapping[str, str], wanted: int) -> list[str] | None:
    """Return this node's GPUs as CUDA_VISIBLE_DEVICES names them; None for the first `wanted` of the machine.

    CUDA_VISIBLE_DEVICES takes precedence over SLURM's numbers: if SLURM hides devices, those visible begin at 0.
    Raises RayDown if fewer than `wanted` are visible.
    """
    if not wanted:
        return []
    for variable in ("CUDA_VISIBLE_DEVICES", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS"):
        if variable in environment:
            found = [name.strip() for name in environment[variable].split(",") if name.strip()]
            if len(found) < wanted:
                raise RayDown(f"{variable}={environment[variable]}: offers {len(found)} of {wanted} GPUs")
            return found[:wanted]
    return None


def free_ports(count: int, host: str) -> list[int]:
    """Return ports that are free now, below those that the kernel assigns; the caller retries if one was lost."""
    try:
        above = int(EPHEMERAL.read_text(encoding="ascii").split()[0])
    except (OSError, ValueError, IndexError):
        above = 32768
    found: list[int] = []
    for port in random.SystemRandom().sample(range(LOWEST_PORT, max(above, LOWEST_PORT + 1000)), k=1000):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as trial, contextlib.suppress(OSError):
            trial.bind((host, port))
            found.append(port)
        if len(found) == count:
            return found
    raise RayDown(f"{host}: has no {count} free ports between {LOWEST_PORT} and {above}")


def temporary_folder(environment: Mapping[str, str]) -> Path:
    """Make a private folder for Ray's sockets, locked by this process as long as it lives.

    Remove such folders of processes that were killed. Raises RayDown if no folder can be made.
    """
    longest = 107 - len(
        "/ray-12345678/worker-12/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store"
    )
    for place in (environment.get("TMPDIR"), "/tmp", "/var/tmp"):  # noqa: S108
        if place and Path(place).is_absolute() and len(place.rstrip("/")) <= longest:
            folder = Path(place) / f"ray-{secrets.token_hex(4)}"
            with contextlib.suppress(OSError):
                folder.mkdir(mode=0o700)
                _hold(folder)
                _sweep(Path(place))
                return folder
    raise RayDown(
        f"TMPDIR={environment.get('TMPDIR', '')}: Ray's sockets need a writable folder with a path of at most "
        f"{longest} characters; neither TMPDIR nor /tmp is one"
    )


def _hold(folder: Path) -> None:
    draft = folder / ".held"
    descriptor = os.open(draft, os.O_CREAT | os.O_RDWR, 0o600)  # stays open: the lock ends with this process
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    draft.rename(folder / HELD)


def _sweep(place: Path) -> None:
    for lock in place.glob(f"ray-????????/{HELD}"):
        with contextlib.suppress(OSError):  # locked, or another user's
            descriptor = os.open(lock, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent, ignore_errors=True)
            finally:
                os.close(descriptor)
