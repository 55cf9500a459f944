"""The device of a rank: its GPU, or the reason why it has none.

A plan for GPUs counts on them: training on the CPU instead would take a hundred times as long, in silence. All ranks
know the reasons of all, so that they end in the same way.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from harness.common.gpus import read_gpus, why_no_gpu
from ssmttm.errors import InputError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

VARIABLE = "SSMSCALE_DEVICE"
"""Environment variable; `cpu` keeps ranks to the CPU, also where GPUs were planned."""
CHOSEN = f"{VARIABLE} is cpu"


def why_on_cpu(local_rank: int) -> str | None:
    """Return why this process cannot use its GPU; None if it can, and has it as its current device from now on.

    Raises InputError if the environment variable is wrong.
    """
    import torch

    wanted = os.environ.get(VARIABLE, "")
    if wanted == "cpu":
        return CHOSEN
    if wanted:
        raise InputError(f"{VARIABLE}: {wanted!r}: must be cpu, or unset for the GPUs of this machine")
    try:
        torch.zeros(1, device=f"cuda:{local_rank}")  # starts CUDA, and raises where it does not start
        torch.cuda.set_device(local_rank)
    except (RuntimeError, AssertionError) as error:
        said = why_no_gpu(read_gpus(), torch.__version__, torch.version.cuda, local_rank + 1)
        return said or f"torch {torch.__version__} cannot use it: {str(error).splitlines()[0]}"
    return None


def tell_all(store: Store, rank: int, world: int, reason: str | None) -> list[str | None]:
    """Return the reasons of all ranks, by rank; every rank calls it once."""
    store.set(f"device-{rank}", json.dumps(reason))
    return [json.loads(store.get(f"device-{other}")) for other in range(world)]


def describe_lack(reasons: Sequence[str | None]) -> str | None:
    """Describe which ranks have no GPU and why; None if all have one or all are kept to the CPU by choice."""
    lacking = [rank for rank, reason in enumerate(reasons) if reason is not None]
    if not lacking or all(reason == CHOSEN for reason in reasons):
        return None
    return f"rank {lacking[0]} of {len(reasons)} finds no GPU: {reasons[lacking[0]]}"
