"""The ranks that train together, and the process group they join.

Ranks tell each other JSON alone: what torch's own collectives of objects receive is unpickled, and so executed.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

from pydantic import TypeAdapter

from harness.common.disk import DiskFull
from harness.common.format import counted
from harness.common.gpus import VISIBLE
from harness.plan.memory import CUDA_CONTEXT
from harness.record.heartbeat import FIRST
from harness.record.journal import Fenced
from harness.record.root import Launch
from harness.study.run import Frozen
from harness.train.device import describe_lack, tell_all, why_on_cpu
from harness.train.meeting import bind_sockets, meet
from harness.train.stopping import GPU_SHARE, is_out_of_memory
from ssmttm.errors import InputError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

T = TypeVar("T")

NCCL_HEARTBEAT = "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"
"""Environment variable of PyTorch: seconds after which NCCL's watchdog itself counts as hung, 480 by default."""
LEAST_TIME_OUT, UNKNOWN_TIME_OUT = timedelta(hours=1), timedelta(days=1)
"""Shortest time-out of a collective, and the one where no plan is known."""
WAIT_MARGIN = 4.0
"""Time-out of a collective, as a multiple of the longest planned wait."""
MOST_BYTES = 2**26
"""Longest value that the first rank sends to the others."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together."""

    rank: int
    world: int
    device: str
    """A torch device: cuda:LOCAL_RANK or cpu."""
    problem: str | None = None
    """Reason why these ranks cannot train what was planned, the same on all of them."""
    is_split: bool = False
    """True if some ranks have a GPU and others none."""

    @property
    def is_first(self) -> bool:
        """True if this process writes journals and checkpoint markers for all."""
        return self.rank == 0

    def check(self) -> None:
        """Raise InputError, on every rank, if these ranks cannot train what was planned."""
        if self.problem is not None:
            raise InputError(self.problem)

    def broadcast(self, value: T, kind: Any) -> T:
        """Return the first rank's value on every rank, sent as JSON and read as the type `kind`; collective."""
        if self.world == 1:
            return value
        adapter = TypeAdapter(kind)
        sent = self._send(adapter.dump_json(value) if self.is_first else b"")
        return value if self.is_first else cast("T", adapter.validate_json(sent))

    def _send(self, content: bytes) -> bytes:
        """Return the first rank's bytes on every rank: torch's own collectives of objects unpickle, and so run code."""
        import torch

        size = torch.tensor([len(content)], device=self.device)
        torch.distributed.broadcast(size, src=0)
        if not 0 < (n_bytes := int(size)) <= MOST_BYTES:
            raise RuntimeError(f"the first rank announces {n_bytes} bytes; {MOST_BYTES} are the most")
        sent = torch.frombuffer(bytearray(content or bytes(n_bytes)), dtype=torch.uint8).to(self.device)
        torch.distributed.broadcast(sent, src=0)
        return sent.cpu().numpy().tobytes()

    def run_on_first(self, action: Callable[[], T], kind: Any = None) -> T:
        """Run an action on the first rank alone; return its value, of type `kind`, or raise its error, on every rank.

        Collective. The other ranks raise an error of the same kind if the end of training depends on it, else
        FirstRankFailed.
        """
        if self.world == 1:
            return action()
        value, problem = None, None
        if self.is_first:
            try:
                value = action()
            except Exception as error:
                problem = error
        told = self.broadcast(_Problem.of(problem) if problem else None, _Problem | None)
        if told is not None:
            raise problem or told.error()
        return cast("T", self.broadcast(value, kind))


class FirstRankFailed(RuntimeError):
    """An action of the first rank for all ranks failed."""


class _Problem(Frozen):
    """An exception of the first rank, as it is sent to the others."""

    kind: str
    text: str
    path: Path | None = None
    needed: int | None = None
    is_read_only: bool = False

    @classmethod
    def of(cls, error: Exception) -> Self:
        if isinstance(error, DiskFull):
            full = {"path": error.path, "needed": error.needed, "is_read_only": error.is_read_only}
            return cls(kind="disk_full", text=str(error), **full)
        kinds = {"fenced": isinstance(error, Fenced), "input": isinstance(error, InputError)}
        kinds["memory"] = is_out_of_memory(error)
        kind = next((kind for kind, is_it in kinds.items() if is_it), "other")
        return cls(kind=kind, text=str(error) if kind != "other" else f"{type(error).__name__}: {error}")

    def error(self) -> Exception:
        if self.kind == "disk_full" and self.path is not None:
            return DiskFull(self.path, self.needed, is_read_only=self.is_read_only)
        kinds = {"fenced": Fenced, "input": InputError, "memory": MemoryError}
        return kinds.get(self.kind, FirstRankFailed)(self.text)


def device_name(device: str) -> str | None:
    """Return the driver's name of a GPU; None for the CPU."""
    if not device.startswith("cuda"):
        return None
    import torch

    return str(torch.cuda.get_device_name(device))


def initialise_ranks(threads: int, planned: Launch | None = None, wanted: int | None = None) -> Ranks:
    """Join the process group described by RANK, WORLD_SIZE and SSMSCALE_MEETING, or be a group of one.

    The group is made once a process and kept: a DeepSpeed engine built after a group was destroyed fails. Where these
    are not the `wanted` ranks or not on the devices that `planned` counts on, the result names the problem and nothing
    may train. Raises InputError if the environment is wrong.
    """
    import torch

    from ssmttm.compat import keep_freed_memory

    share = float(os.environ.get(GPU_SHARE, "1"))
    torch.set_num_threads(max(1, int(share * threads)))  # ranks that share a GPU share its cores
    keep_freed_memory()
    if os.environ.get("SUBMITIT_EXECUTOR") == "slurm" and "SLURM_PROCID" in os.environ:
        from submitit.helpers import TorchDistributedEnvironment

        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = planned.device if planned else None
    if wanted not in {None, world}:
        problem = (
            f"this worker was started as rank {rank} of {world}, and the study's plan has {wanted}: the launcher hides "
            "its variables (such as SLURM_PROCID and SLURM_NTASKS) from its tasks, or starts another number of them"
        )
        if not torch.distributed.is_initialized():  # a group of another number might never be complete
            return Ranks(0, 1, "cpu", problem)
        return replace(_joined(), problem=problem)
    if device == "cpu" and not torch.distributed.is_initialized():
        os.environ[VISIBLE] = ""
    _set_time_outs(planned)
    ranks = _joined()
    if ranks.problem is not None and device == "cuda":
        return replace(ranks, problem=f"planned for {counted(world, 'GPU')}, but {ranks.problem}")
    return ranks if ranks.is_split else replace(ranks, problem=None)


@cache
def _joined() -> Ranks:
    """Join the process group, once; a rank without a GPU is named as the problem, and all then use the CPU."""
    import torch

    from ssmttm.compat import without_mlflow

    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))
    store, reasons = _meet(rank, world, why_on_cpu(local_rank))
    on_cuda = set(reasons) == {None}
    if on_cuda:
        _keep_to_share()
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    backend = "nccl" if on_cuda else "gloo"
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world)
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with without_mlflow():
        import deepspeed

    # DeepSpeed would start compilers to learn what it could build, and then build its collectives for half a minute.
    vars(deepspeed.ops)["__compatible_ops__"] = {}
    deepspeed.init_distributed(dist_backend=backend, verbose=False)
    if not gc.get_freeze_count():
        gc.freeze()  # the imports made no garbage, and every Series ends with a collection
    device, is_split = f"cuda:{local_rank}" if on_cuda else "cpu", None in reasons and not on_cuda
    return Ranks(rank, world, device, describe_lack(reasons), is_split=is_split)


def _meet(rank: int, world: int, reason: str | None) -> tuple[Store, list[str | None]]:
    """Return the store that all ranks share, and the reason of each for having no GPU."""
    from torch._C._distributed_c10d import HashStore

    # DeepSpeed reads these even where the group already exists.
    os.environ.setdefault("RANK", str(rank))
    os.environ.setdefault("WORLD_SIZE", str(world))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    folder = os.environ.get("SSMSCALE_MEETING")
    if world > 1 and not folder:
        raise InputError(
            f"WORLD_SIZE={world}: ranks meet in a folder that SSMSCALE_MEETING names, and it is not set; let "
            "`ssmscale submit` start them"
        )
    if folder and world > 1:
        store = meet(Path(folder), rank, world)
        return store, tell_all(store, rank, world, reason)
    bind_sockets(is_one_node=True)
    return HashStore(), [reason]


def _keep_to_share() -> None:
    """Have a rank that needs more than its share of a GPU fail itself, and not its neighbours."""
    import torch

    if share := os.environ.get(GPU_SHARE):
        _, total = torch.cuda.mem_get_info()
        # Only torch's own allocations count; the context of each process comes on top.
        torch.cuda.set_per_process_memory_fraction(max(0.0, float(share) - CUDA_CONTEXT / total))


def _set_time_outs(planned: Launch | None) -> None:
    """Let collectives wait for the longest wait that the plan counts on, with a margin.

    The margin also exceeds the patience of a supervisor, which ends ranks that stall and knows which pauses are usual:
    PyTorch's own ten minutes for NCCL would end ranks that wait while one converts or marks a large checkpoint.
    """
    from torch.distributed import distributed_c10d

    limit = UNKNOWN_TIME_OUT
    if planned is not None and planned.wait_seconds is not None:
        seconds = max(WAIT_MARGIN * planned.wait_seconds, 2 * FIRST * planned.stall_seconds)
        limit = max(LEAST_TIME_OUT, timedelta(seconds=seconds))
    names = "default_pg_timeout", "default_pg_nccl_timeout"  # DeepSpeed's own groups take no other
    vars(distributed_c10d).update(dict.fromkeys(names, limit))
    for group in distributed_c10d._world.pg_map:  # NCCL's watchdog ends a rank by the time-out of its group
        distributed_c10d._set_pg_timeout(limit, group)
    # Groups read it when they are made.
    os.environ.setdefault(NCCL_HEARTBEAT, str(int(limit.total_seconds())))
