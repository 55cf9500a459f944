"""Where a node of Ray's goes on its host: the address it listens at, its GPUs, and a folder for its sockets."""

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
"""File of a temporary folder that the process holds whose folder it is."""
LOWEST_PORT = 10000
EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


class RayDown(SchedulerUnavailable):
    """Ray did not start, or is gone; a sentence says what is missing."""

    def __init__(self, why: str) -> None:
        super().__init__("Ray", why)


def address_towards(others: Sequence[str]) -> str:
    """The address by which other hosts reach this one; the loopback where there are none, or all of them are here.

    Raises RayDown where one of them is not known here.
    """
    for other in others:
        try:
            kind, _, _, _, place = socket.getaddrinfo(other, 9, type=socket.SOCK_DGRAM)[0]
        except OSError as error:
            raise RayDown(f"{other}: is not known by that name on {os.uname().nodename}") from error
        with socket.socket(kind, socket.SOCK_DGRAM) as trial:
            trial.connect(place)  # sends nothing
            address = str(trial.getsockname()[0])
        if not address.startswith("127.") and address != "::1":
            return address
    return LOOPBACK


def offered_gpus(environment: Mapping[str, str], wanted: int) -> list[str] | None:
    """Names of the GPUs that this node offers, as CUDA_VISIBLE_DEVICES takes them; None for the first ones there are.

    What SLURM puts into CUDA_VISIBLE_DEVICES goes before its own numbers: where it hides devices they begin at 0.
    Raises RayDown where there are fewer than `wanted`.
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
    """Ports that nobody listens on now, below those the kernel gives away; what is lost since is chosen again."""
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
    """Make a folder for Ray's sockets that nobody else can enter, this process's for as long as it lives.

    Folders of processes of ours that were killed go. Raises RayDown where there is no place for one.
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
        f"TMPDIR={environment.get('TMPDIR', '')}: Ray's sockets need a folder that can be written to and whose path "
        f"has at most {longest} characters; neither it nor /tmp is one"
    )


def _hold(folder: Path) -> None:
    draft = folder / ".held"
    fcntl.flock(
        os.open(draft, os.O_CREAT | os.O_RDWR, 0o600), fcntl.LOCK_EX
    )  # the kernel lets go of it with us
    draft.rename(folder / HELD)


def _sweep(place: Path) -> None:
    for lock in place.glob(f"ray-????????/{HELD}"):
        with contextlib.suppress(OSError):  # somebody else's
            descriptor = os.open(lock, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent, ignore_errors=True)
            finally:
                os.close(descriptor)
