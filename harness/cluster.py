"""Where training happens, and layouts that meet a global batch exactly; harness.resources chooses among them."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from harness.memory import GIB
from harness.run import Precision
from harness.rundir import Layout
from harness.speed import Device
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
    gpu_type: str | None = None
    """A GPU's name, or a profile's word for it."""
    hours: float | None = None
    """Longest time a job may ask for; None where there is no limit."""
    mfu: float | None = None
    """Share of the peak that training reaches there, where the site knows it."""

    def device(self, precision: Precision, threads: int, peak_flops: float | None = None) -> Device:
        """What a rank computes on."""
        if not self.gpus:
            return Device("cpu", threads=threads)
        return Device("cuda", self.gpu_type, peak_flops or self.peak_flops.get(precision), mfu=self.mfu)


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
        gpu_type=_gpu_model(drivers) if gpus else None,
    )


def _gpu_model(drivers: Path) -> str | None:
    for facts in sorted(drivers.glob("*/information")):
        for line in facts.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("Model:"):
                return line.removeprefix("Model:").strip()
    return None


def choose_layout(batch: int, ranks: int, micro_batch: int, zero_stage: int, threads: int) -> Layout:
    """The layout that meets the global batch exactly with the largest micro-batch not above `micro_batch`.

    Raises InputError where the ranks do not divide the batch.
    """
    if batch % ranks:
        raise InputError(f"training.batch: {batch}: does not divide among {ranks} ranks (resources.ranks)")
    share = batch // ranks
    micro = max(m for m in divisors(share) if m <= micro_batch)
    return Layout.model_validate(
        {
            "ranks": ranks,
            "micro_batch": micro,
            "accumulation": share // micro,
            "zero_stage": zero_stage,
            "threads": threads,
        }
    )


def nodes_for(layout: Layout, cluster: Cluster) -> int:
    """Nodes a layout takes, as many ranks on each."""
    return -(-layout.ranks // ranks_a_node(cluster, layout.threads))


def ranks_a_node(cluster: Cluster, threads: int) -> int:
    """Ranks that a node takes: one a GPU, else one for each share of its cores."""
    return cluster.gpus or max(1, cluster.cores // threads)


def divisors(number: int) -> list[int]:
    """Every divisor of a number, in no order."""
    low = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return [*low, *(number // divisor for divisor in low)]
