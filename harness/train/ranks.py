"""How the ranks of a job on several nodes find each other: through a file in a directory all of them see.

The first rank listens on a port the system gives it and writes down where, so that jobs sharing a node never clash over
a port and no name has to resolve that the site does not use itself.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.common.disk import write_atomically
from harness.train.stopping import GPU_SHARE

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together."""

    rank: int
    world: int
    device: str
    """A torch device: cuda:LOCAL_RANK or cpu."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes for all of them."""
        return self.rank == 0

    def broadcast(self, value: Any) -> Any:
        """The first rank's value, on every rank; collective."""
        if self.world == 1:
            return value
        import torch

        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def run_on_first(self, action: Callable[[], None]) -> None:
        """Run something on the first rank alone; what it raises is raised on every rank. Collective."""
        problem: Exception | None = None
        if self.is_first:
            try:
                action()
            except Exception as error:
                problem = error
        problem = self.broadcast(problem)
        if problem is not None:
            raise problem


def device_name(device: str) -> str | None:
    """A GPU as its driver names it; None for the CPU."""
    if not device.startswith("cuda"):
        return None
    import torch

    return str(torch.cuda.get_device_name(device))


def initialise_ranks(threads: int) -> Ranks:
    """Join the process group described by RANK, WORLD_SIZE and MASTER_ADDR, or be a group of one.

    The group is made once a process and kept: a DeepSpeed engine built after a group was destroyed fails.
    """
    import torch

    from ssmttm.compat import keep_freed_memory, without_mlflow

    on_cuda = torch.cuda.is_available()
    if not on_cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.set_num_threads(threads)
    keep_freed_memory()
    if os.environ.get("SUBMITIT_EXECUTOR") == "slurm" and "SLURM_PROCID" in os.environ:
        from submitit.helpers import TorchDistributedEnvironment

        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))
    if on_cuda:
        torch.cuda.set_device(local_rank)
        if share := os.environ.get(GPU_SHARE):  # who needs more runs out of memory, and not its neighbours
            torch.cuda.set_per_process_memory_fraction(float(share))
    if not torch.distributed.is_initialized():
        _join(rank, world, "nccl" if on_cuda else "gloo")
    _quieten_deepspeed()
    with without_mlflow():
        import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would compile for half a minute
    deepspeed.init_distributed(dist_backend="nccl" if on_cuda else "gloo", verbose=False)
    return Ranks(rank, world, f"cuda:{local_rank}" if on_cuda else "cpu")


def _join(rank: int, world: int, backend: str) -> None:
    import torch
    from torch._C._distributed_c10d import FileStore, HashStore

    # DeepSpeed reads these even where the group already exists.
    os.environ.setdefault("RANK", str(rank))
    os.environ.setdefault("WORLD_SIZE", str(world))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    if world == 1:  # no port to clash over
        torch.distributed.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    elif meeting := os.environ.get("SSMSCALE_RENDEZVOUS"):  # on one machine
        file_store = FileStore(meeting, world)
        torch.distributed.init_process_group(backend, store=file_store, rank=rank, world_size=world)
    elif folder := os.environ.get("SSMSCALE_MEETING"):  # on several
        store = meet(Path(folder), rank, world)
        torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world)
    else:
        torch.distributed.init_process_group(backend, init_method="env://")


def _quieten_deepspeed() -> None:
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


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
