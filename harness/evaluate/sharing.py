"""Share prompts of Runs among tasks: each task has consecutive blocks of about the same time.

A block is generated in one batch, so tasks consist of whole blocks. Small Runs share a task, and a large Run is divided
among several: loading a model takes seconds, and a task that lives for some minutes repays them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

from harness.plan.cluster import Cluster
from harness.study.run import Count, Frozen, WholeNumber
from ssmttm.model.config import ModelConfig
from ssmttm.model.flops import parameter_count

TASK_SECONDS = 600.0
"""Time of a task whose number is not given: long beside its start, short beside a job's time limit."""
START_SECONDS = 30.0
"""Time in which a task starts and loads its first model."""
STEP_SECONDS = 0.004
"""Time of one step of the smallest model, in which kernels are launched."""
BYTES_A_SECOND = {"GPU": 1e12, "core": 5e9}
"""Memory traffic of a device: each step reads all weights, four bytes each."""
FLOPS = {"GPU": 2e13, "core": 1e10}
"""Operations a second that a device reaches in the small matrices of a step."""
UNCERTAIN = 4.0
"""Factor between the expected time and each end of its range."""


class Slice(Frozen):
    """Consecutive prompts of one Run: `first` to `last` - 1."""

    run_id: str
    first: WholeNumber
    last: Count

    @property
    def prompts(self) -> range:
        """Numbers of its prompts."""
        return range(self.first, self.last)


class Block(NamedTuple):
    """Prompts that are generated in one batch."""

    prompts: Slice
    seconds: float
    """Expected time."""


def blocks_of(run_id: str, n: int, batch: int, seconds: float) -> list[Block]:
    """Return the blocks of a Run with n prompts; `seconds` is the expected time of a full batch."""
    found = []
    for first in range(0, n, batch):
        last = min(n, first + batch)
        found.append(Block(Slice(run_id=run_id, first=first, last=last), seconds * (last - first) / batch))
    return found


def batch_seconds(config: ModelConfig, frames: int, rows: int, cluster: Cluster) -> float:
    """Return the expected time of generating a batch of so many rows, in seconds; within a factor of four or so."""
    kind, n_params = cluster.device_kind, parameter_count(config).n_params
    steps = frames + config.n_codebooks
    return steps * (STEP_SECONDS + 4 * n_params / BYTES_A_SECOND[kind] + 2 * n_params * rows / FLOPS[kind])


def share_out(blocks: Sequence[Block], parts: int | None = None) -> list[list[Block]]:
    """Divide blocks among so many tasks, at most one a block, in their order and by their expected time.

    Without a number each task takes about TASK_SECONDS.
    """
    total = sum(block.seconds for block in blocks)
    count = min(len(blocks), parts or max(1, math.ceil(total / TASK_SECONDS)))
    shares: list[list[Block]] = []
    done = 0.0
    for number, block in enumerate(blocks):
        is_due = not shares or done + block.seconds / 2 >= total * len(shares) / count
        left = count - len(shares)
        if left and (is_due or len(blocks) - number <= left):
            shares.append([])
        shares[-1].append(block)
        done += block.seconds
    return shares


def joined(blocks: Iterable[Block]) -> list[Slice]:
    """Return the slices of consecutive blocks, each as long as possible."""
    found: list[Slice] = []
    for run_id, some in groupby((block.prompts for block in blocks), key=lambda one: one.run_id):
        for one in some:
            if found and found[-1].run_id == run_id and found[-1].last == one.first:
                found[-1] = found[-1].model_copy(update={"last": one.last})
            else:
                found.append(one)
    return found
