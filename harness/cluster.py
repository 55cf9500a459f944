"""Where training happens and what a Series gets there: from sizes and hardware to ranks, threads and micro-batch.

Resources never change an experiment: the global batch is met exactly by micro-batch x accumulation x ranks.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from harness.cost import GIB, memory_gib
from harness.run import Precision, Run
from harness.rundir import Layout
from harness.study import ResourceChoice
from ssmttm.errors import InputError


@dataclass(frozen=True)
class Cluster:
    """What one kind of place offers; this machine, where no profile names another."""

    name: str
    nodes: int
    gpus: int
    """GPUs a node; 0 where ranks run on the CPU."""
    cores: int
    """CPU cores a node that may be used."""
    memory_gib: float
    """Memory a node offers its CPU ranks."""
    peak_flops: Mapping[Precision, float] = field(default_factory=dict)
    """Peak FLOP/s of a rank's device by precision, where known."""
    gpu_memory_gib: float | None = None
    """Memory of a GPU, where known."""


def this_machine() -> Cluster:
    """The machine this process runs on, without importing anything heavy to ask."""
    drivers = Path("/proc/driver/nvidia/gpus")
    gpus = len(list(drivers.iterdir())) if drivers.is_dir() else 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        gpus = min(gpus, len([device for device in visible.split(",") if device.strip() not in {"", "-1"}]))
    return Cluster(
        name="local",
        nodes=1,
        gpus=gpus,
        cores=len(os.sched_getaffinity(0)),
        memory_gib=psutil.virtual_memory().total / GIB,
    )


def choose_layout(batch: int, ranks: int, micro_batch: int, zero_stage: int, threads: int) -> Layout:
    """The layout that meets the global batch exactly with the largest micro-batch not above `micro_batch`.

    Raises InputError where the ranks do not divide the batch.
    """
    if batch % ranks:
        raise InputError(f"training.batch: {batch}: does not divide among {ranks} ranks (resources.ranks)")
    share = batch // ranks
    micro = max(m for m in _divisors(share) if m <= micro_batch)
    return Layout.model_validate(
        {
            "ranks": ranks,
            "micro_batch": micro,
            "accumulation": share // micro,
            "zero_stage": zero_stage,
            "threads": threads,
        }
    )


def choose_resources(run: Run, choice: ResourceChoice, cluster: Cluster) -> Layout:
    """The layout of a Series here: what the study asks for, else the largest micro-batch that fits in memory.

    Raises InputError where the machine has too few devices or cores for the ranks asked for.
    """
    threads = choice.threads or 1
    a_node = _ranks_a_node(cluster, threads)
    if choice.ranks > cluster.nodes * a_node:
        kind = "GPUs" if cluster.gpus else "cores"
        raise InputError(
            f"resources.ranks: {choice.ranks}: {cluster.name} has {cluster.nodes * a_node} {kind} to a job"
        )
    if choice.ranks % (nodes := -(-choice.ranks // a_node)):
        raise InputError(
            f"resources.ranks: {choice.ranks}: does not divide among the {nodes} nodes of {cluster.name} it takes"
        )
    micro = choice.micro_batch or _fitting_micro_batch(run, choice, cluster)
    layout = choose_layout(run.batch, choice.ranks, micro, choice.zero_stage, threads)
    return layout.model_copy(update={"activation_checkpointing": choice.activation_checkpointing})


def nodes_for(layout: Layout, cluster: Cluster) -> int:
    """Nodes a layout takes, as many ranks on each."""
    return -(-layout.ranks // _ranks_a_node(cluster, layout.threads))


def _ranks_a_node(cluster: Cluster, threads: int) -> int:
    return cluster.gpus or max(1, cluster.cores // threads)


def _fitting_micro_batch(run: Run, choice: ResourceChoice, cluster: Cluster) -> int:
    share = max(1, run.batch // choice.ranks)
    if cluster.gpus:
        if cluster.gpu_memory_gib is None:
            return share
        free = 0.8 * cluster.gpu_memory_gib
    else:
        slots = max(1, cluster.nodes * cluster.cores // (choice.ranks * (choice.threads or 1)))
        free = 0.5 * cluster.nodes * cluster.memory_gib / (slots * choice.ranks)
    fitting = (
        micro
        for micro in _divisors(share)
        if memory_gib(
            run.model,
            frames=run.frames,
            micro_batch=micro,
            ranks=choice.ranks,
            zero_stage=choice.zero_stage,
            checkpointed=choice.activation_checkpointing,
        )
        <= free
    )
    return max(fitting, default=1)


def _divisors(number: int) -> list[int]:
    low = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return [*low, *(number // divisor for divisor in low)]
