"""The meeting of one group's ranks, in a folder that only their user can enter, so that no stranger joins them.

They find each other through a file there and open no socket for it. Where the file system's locks do not reach from
node to node such a file would be torn, and the first rank listens instead: on the job's network interface alone, and
under keys that begin with a secret of the folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import socket
import stat
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import psutil

from harness.common.disk import make_folder, write_atomically
from harness.study.run import Frozen
from ssmttm.errors import InputError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

PATIENCE = timedelta(hours=1)
"""Longest wait of ranks for each other; where a supervisor watches them, it ends a start that stalls earlier."""
NOWHERE = ("192.0.2.1", 9)
"""An address of no machine (RFC 5737): the route to it tells which interface leads out, and nothing is sent."""


class _Lock(Frozen):
    """The first rank's note: the result of locking the lock file."""

    is_held: bool


class _Arrival(Frozen):
    """The note of another rank."""

    node: str
    sees_lock: bool


class _Place(Frozen):
    """The first rank's decision: to meet in a file of the folder, or at an address."""

    is_one_node: bool
    host: str | None = None
    port: int = 0
    secret: str = ""


_Note = TypeVar("_Note", _Lock, _Arrival, _Place)


def make_meeting(folder: Path) -> None:
    """Make the folder in which the ranks of one group meet; raises FileExistsError if it is there."""
    make_folder(folder.parent)
    folder.mkdir(mode=0o700)


def meet(folder: Path, rank: int, world: int) -> Store:
    """Return the store that all ranks of a group share, and bind the sockets of gloo and NCCL to one interface.

    The interface is the loopback if all ranks are on one node, else the one that the node's name belongs to, unless
    GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names another. Raises InputError if other users can enter the folder, and
    TimeoutError if a rank does not appear.
    """
    facts = folder.stat()
    if facts.st_uid != os.geteuid() or stat.S_IMODE(facts.st_mode) & 0o077:
        raise InputError(
            f"{folder}: other users can enter it, so ranks do not meet there; make it with mode 700"
        )
    if rank == 0:
        place, store = _choose(folder, world)
    else:
        place, store = _follow(folder, rank), None
    bind_sockets(is_one_node=place.is_one_node)
    return store or _open(folder, place, world)


def _choose(folder: Path, world: int) -> tuple[_Place, Store | None]:
    """Decide where the ranks meet, as the first of them."""
    with (folder / "lock").open("w") as file:
        is_held = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            is_held = False
        _write(folder / "first.json", _Lock(is_held=is_held))
        others = [_wait_for(folder / f"rank-{rank}.json", _Arrival) for rank in range(1, world)]
    is_one_node = {other.node for other in others} <= {_node()}
    store = None
    if all(other.sees_lock for other in others):
        place = _Place(is_one_node=is_one_node)
    else:
        place, store = _listen(world, is_one_node=is_one_node)
    _write(folder / "place.json", place)
    return place, store


def _follow(folder: Path, rank: int) -> _Place:
    """Tell the first rank what this one sees, and return its decision."""
    is_held = _wait_for(folder / "first.json", _Lock).is_held
    sees_lock = False
    if is_held:
        with (folder / "lock").open("r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                sees_lock = True
            except OSError:
                sees_lock = False
    _write(folder / f"rank-{rank}.json", _Arrival(node=_node(), sees_lock=sees_lock))
    return _wait_for(folder / "place.json", _Place)


def _open(folder: Path, place: _Place, world: int) -> Store:
    from torch._C._distributed_c10d import FileStore, PrefixStore, TCPStore

    if place.host is None:
        store = FileStore(str(folder / "store"), world)
        store.set_timeout(PATIENCE)
        return store
    return PrefixStore(
        place.secret, TCPStore(place.host, place.port, world, is_master=False, timeout=PATIENCE)
    )


def _listen(world: int, *, is_one_node: bool) -> tuple[_Place, Store]:
    from torch._C._distributed_c10d import PrefixStore, TCPStore

    found = None if is_one_node else _interface()
    host = found[1] if found else "127.0.0.1"
    listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    port = listener.getsockname()[1]
    store = TCPStore(
        *(host, port, world),
        is_master=True,
        timeout=PATIENCE,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    secret = secrets.token_urlsafe(24)
    place = _Place(is_one_node=is_one_node, host=host, port=port, secret=secret)
    return place, PrefixStore(secret, store)


def _write(path: Path, note: Frozen) -> None:
    write_atomically(path, note.model_dump_json())


def _wait_for(path: Path, kind: type[_Note]) -> _Note:
    deadline = time.monotonic() + PATIENCE.total_seconds()
    # A network file system remembers that a file was missing until the folder is read again.
    while path.name not in os.listdir(path.parent):  # noqa: PTH208
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path}: a rank of this group did not start within {PATIENCE}")
        time.sleep(0.02)
    return kind.model_validate_json(path.read_bytes())


def _node() -> str:
    """Return what only ranks with the same loopback interface share: this start of the system, and its network."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot} {Path('/proc/self/ns/net').stat().st_ino}"


def bind_sockets(*, is_one_node: bool) -> None:
    """Have gloo and NCCL listen on one interface only, unless the environment names one."""
    found = ("lo", "127.0.0.1") if is_one_node else _interface()
    if found is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", found[0])
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={found[0]}")


def _interface() -> tuple[str, str] | None:
    """Return the network interface by which other nodes reach this one, and its address; None if there is none."""
    own = {
        address.address.split("%")[0]: name
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family in {socket.AF_INET, socket.AF_INET6}
    }
    if named := os.environ.get("GLOO_SOCKET_IFNAME"):
        return next(((name, address) for address, name in own.items() if name == named), None)
    return next(
        ((own[address], address) for address in _own_addresses() if own.get(address, "lo") != "lo"), None
    )


def _own_addresses() -> Iterator[str]:
    """Yield the addresses of this node's names, that of SLURM first; then the one that leads out."""
    for name in (os.environ.get("SLURMD_NODENAME"), socket.gethostname(), socket.getfqdn()):
        with contextlib.suppress(OSError):
            if name:
                yield from (
                    str(info[4][0]) for info in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
                )
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outwards:
        outwards.connect(NOWHERE)
        yield str(outwards.getsockname()[0])
