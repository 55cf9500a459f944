"""How the ranks of a job on several nodes find each other: through a file in a directory all of them see.

The first rank listens on a port the system gives it and writes down where, so that jobs sharing a node never clash over
a port and no name has to resolve that the site does not use itself.
"""

from __future__ import annotations

import json
import os
import socket
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from harness.rundir import write_atomically

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

PATIENCE = timedelta(minutes=10)
"""How long ranks wait for each other: nodes of one job may start minutes apart."""


def meet(folder: Path, rank: int, world: int) -> TCPStore:
    """The store all ranks share; every rank calls it. Raises TimeoutError where the first rank does not appear."""
    from torch._C._distributed_c10d import TCPStore

    note = folder / "address.json"
    if rank == 0:
        store = TCPStore("0.0.0.0", 0, world, is_master=True, timeout=PATIENCE, wait_for_workers=False)  # noqa: S104
        write_atomically(note, json.dumps({"hosts": _own_addresses(), "port": store.port}))
        return store
    deadline = time.monotonic() + PATIENCE.total_seconds()
    while not note.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{note}: the first rank has not said where it listens")
        time.sleep(0.05)
    where = json.loads(note.read_text(encoding="utf-8"))
    return TCPStore(
        _reachable(where["hosts"], where["port"]), where["port"], world, is_master=False, timeout=PATIENCE
    )


def _own_addresses() -> list[str]:
    """What other nodes may call this one, the likeliest first."""
    names = [os.environ.get("SLURMD_NODENAME", ""), socket.gethostname(), socket.getfqdn()]
    found = [name for name in dict.fromkeys(names) if name]
    for name in list(found):
        try:
            found += [str(info[4][0]) for info in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)]
        except OSError:
            continue
    # A loopback address means another machine there than here: it is tried last, for nodes that are one machine.
    return sorted(
        dict.fromkeys(found), key=lambda name: name.startswith("127.") or name in {"localhost", "::1"}
    )


def _reachable(hosts: list[str], port: int) -> str:
    """The first of some names that answers on a port; raises ConnectionError where none does."""
    for host in hosts:
        try:
            socket.create_connection((host, port), timeout=5).close()
        except OSError:
            continue
        return host
    raise ConnectionError(f"the first rank listens on port {port} of none of {', '.join(hosts)}")
