"""Resources of a Series: the fewest GPUs on which it fits and ends in time, and of these the layout that costs least.

Resources never change an experiment: micro-batch x accumulation x ranks is exactly the global batch. The study's own
choices hold, and each other choice comes with a sentence that gives the reason.

ROOT/studies/NAME/out_of_memory.jsonl records the micro-batches that did not fit, a line each time a rank ran out of
memory, so that no later Series of that shape tries them again. A shape is everything but the micro-batch that decides
the memory of a rank; seeds, learning rates and iterations do not. Where other work took memory of the same device, the
failure tells nothing of the shape, and counts for its own Series alone.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from harness.common.disk import append_line, appending, make_folder
from harness.common.format import GIB, Estimate, counted
from harness.common.jsonl import read_lines
from harness.plan.cluster import Cluster, choose_layout, divisors, ranks_a_node
from harness.plan.memory import Memory, host_bytes, memory
from harness.plan.speed import same_device
from harness.record.root import Layout
from harness.study.run import Precision, Run
from harness.study.schema import ResourceChoice
from ssmttm.errors import InputError

NAME = "out_of_memory.jsonl"
FRACTIONS = (8, 4, 3, 2, 1)
"""Numbers of Series that may share a GPU."""
CPU_SHARE = 0.5
"""Share of a machine's memory that its ranks may fill; the rest is left to other processes."""
HoursOf = Callable[[Layout], Estimate]
"""Predicts the hours of a whole Series on a layout."""


@dataclass(frozen=True)
class Resources:
    """The resources of a Series, with reasons."""

    layout: Layout
    memory: Memory
    gpu_fraction: float
    """Share of a GPU it needs; below 1 several Series can be packed on one."""
    host_gib: float
    """Host memory of each rank, GiB; 0 on the CPU, where `memory` is the host's."""
    why: dict[str, str]
    """A sentence for each chosen key of the layout."""


class Refused:
    """A study's record of micro-batches that did not fit."""

    def __init__(self, study_dir: Path) -> None:
        self._failed: dict[str, list[tuple[int, str, str | None, str | None]]] = {}
        for line in read_lines(study_dir / NAME):
            shape, micro, device = line.get("shape"), line.get("micro_batch"), line.get("device")
            if isinstance(shape, str) and isinstance(micro, int) and isinstance(device, str):
                only = None if line.get("alone", True) else line.get("series")
                self._failed.setdefault(shape, []).append((micro, device, line.get("device_name"), only))

    def most(self, run: Run, layout: Layout, kind: str, device_name: str | None) -> int | None:
        """Return half of the smallest micro-batch that failed on such a device (0 for one of 1), None if none did."""
        failed = [
            micro
            for micro, device, name, only in self._failed.get(_shape(run, layout), ())
            if device == kind and same_device(device_name, name) and only in {None, run.series_id}
        ]
        return min(failed) // 2 if failed else None


@dataclass(frozen=True)
class _Request:
    """A Series that needs resources on a cluster."""

    run: Run
    choice: ResourceChoice
    cluster: Cluster
    refused: Refused | None
    measured: float | None

    @property
    def threads(self) -> int:
        return self.choice.threads or self.cluster.cores_a_device

    def free_gib(self, ranks: int) -> float | None:
        """Return the GiB a rank may take; None where that is not known."""
        if self.cluster.gpus:
            return self.cluster.gpu_memory_gib
        nodes = self.cluster.nodes
        slots = max(1, nodes * self.cluster.cores // (ranks * self.threads))
        return CPU_SHARE * nodes * self.cluster.memory_gib / (slots * ranks)

    def memory(self, layout: Layout) -> Memory:
        return memory(self.run, layout, on_cuda=self.cluster.gpus > 0).corrected(self.measured)

    def host_gib(self, layout: Layout) -> float:
        """Return the GiB of host memory of a rank beside a GPU; 0 on the CPU."""
        return host_bytes(self.run.model, layout) / GIB if self.cluster.gpus else 0.0

    def fits(self, layout: Layout) -> bool:
        """True if the high end of a layout's memory is free."""
        free = self.free_gib(layout.ranks)
        return free is None or self.memory(layout).gib.high <= free

    def fits_host(self, layout: Layout) -> bool:
        """True if a node has the host memory of its ranks."""
        ranks = min(layout.ranks, self.cluster.gpus)
        return ranks * self.host_gib(layout) <= CPU_SHARE * self.cluster.memory_gib

    def largest(self, ranks: int, stage: int, *, checkpointed: bool) -> tuple[Layout, bool, int | None]:
        """Return the layout with the largest micro-batch that fits, if any does, and the limit set by a failure."""
        layout = choose_layout(self.run.batch, ranks, self.run.batch, stage, self.threads)
        compiled = is_compiled(self.choice.compile, stage, on_cuda=self.cluster.gpus > 0)
        layout = layout.model_copy(update={"activation_checkpointing": checkpointed, "compiled": compiled})
        device = self.cluster.device(self.run.precision, self.threads)
        most = self.refused.most(self.run, layout, device.kind, device.name) if self.refused else None
        if asked := self.choice.micro_batch:
            layout = _with_micro_batch(self.run, layout, asked if most is None else min(asked, max(1, most)))
            return layout, self.fits(layout) and self.fits_host(layout) and most != 0, most
        for micro in reversed(divisors(self.run.batch // ranks)):
            tried = _with_micro_batch(self.run, layout, micro)
            if (most is None or micro <= most) and self.fits(tried):
                return tried, self.fits_host(tried), most
        return _with_micro_batch(self.run, layout, 1), False, most


def choose_resources(
    run: Run,
    choice: ResourceChoice,
    cluster: Cluster,
    *,
    refused: Refused | None = None,
    hours: HoursOf | None = None,
    measured: float | None = None,
) -> Resources:
    """Choose the resources of a Series; automatic ranks depend on `hours`.

    measured: measured peaks of GPU memory over expected ones; see `Speeds.measured_memory`.
    Raises InputError where the cluster has too few devices for the ranks of `choice`, or none of the Run's precision.
    """
    if run.precision is Precision.TF32 and not cluster.gpus:
        raise InputError(
            f"training.precision: tf32: {cluster.name} has no GPU, and a CPU computes no TF32; choose a cluster with "
            "GPUs, or --set training.precision=fp32"
        )
    request = _Request(run, choice, cluster, refused, measured)
    if choice.ranks is None:
        layout, why = _fewest(request, hours)
    else:
        _check_ranks(choice.ranks, cluster, request.threads)
        stage, checkpointed = choice.zero_stage or 0, bool(choice.activation_checkpointing)
        layout, _, most = request.largest(choice.ranks, stage, checkpointed=checkpointed)
        why = {"ranks": f"{choice.ranks}, as resources.ranks says"}
        why["micro_batch"] = _why_micro_batch(request, layout, most)
    fraction = _fraction(request, layout)
    if fraction < 1:
        why["gpu_fraction"] = f"{fraction:.3g} of a GPU's memory holds it, at the high end of the estimate"
    if layout.compiled or choice.compile:
        why["compile"] = "on" if layout.compiled else "off: ZeRO 3's hooks between layers cannot be compiled"
    if not request.fits_host(layout):
        taken, there = request.host_gib(layout), CPU_SHARE * cluster.memory_gib
        why["host_memory"] = (
            f"a rank takes about {taken:.3g} GiB of the host's, and a node has {there:.3g} to fill"
        )
    return Resources(layout, request.memory(layout), fraction, request.host_gib(layout), why)


def is_compiled(asked: bool | None, zero_stage: int, *, on_cuda: bool) -> bool:
    """Return True if blocks are to be compiled: on GPUs, unless the study's `resources.compile` says otherwise.

    Never under ZeRO 3, which gathers each layer's weights by hooks that torch.compile cannot trace.
    """
    return zero_stage < 3 and (on_cuda if asked is None else asked)


def _check_ranks(ranks: int, cluster: Cluster, threads: int) -> None:
    a_node = ranks_a_node(cluster, threads)
    if ranks > cluster.nodes * a_node:
        devices = counted(cluster.nodes * a_node, cluster.device_kind)
        raise InputError(f"resources.ranks: {ranks}: a job on {cluster.name} has at most {devices}")
    if ranks > 1 and cluster.has_slices:
        raise InputError(
            f"resources.ranks: {ranks}: MIG slices ({cluster.gpu_type}) train no series together; set "
            "resources.ranks: 1"
        )
    if ranks % (nodes := -(-ranks // a_node)):
        raise InputError(f"resources.ranks: {ranks}: does not divide among {nodes} nodes of {cluster.name}")


def _with_micro_batch(run: Run, layout: Layout, micro_batch: int) -> Layout:
    chosen = choose_layout(run.batch, layout.ranks, micro_batch, layout.zero_stage, layout.threads)
    return layout.model_copy(update={"micro_batch": chosen.micro_batch, "accumulation": chosen.accumulation})


def _fewest(request: _Request, hours: HoursOf | None) -> tuple[Layout, dict[str, str]]:
    """Choose the fewest ranks on which a Series fits and ends within a job's time; else those that come nearest."""
    limit = request.cluster.hours
    fitting: list[tuple[Layout, int | None, float]] = []
    starved: tuple[Layout, int | None] | None = None
    for ranks in _possible_ranks(request):
        for stage, checkpointed in _ways(request.choice, ranks):
            layout, fits, most = request.largest(ranks, stage, checkpointed=checkpointed)
            if not fits:
                if starved is None and request.fits(layout) and not request.fits_host(layout):
                    starved = layout, most
                continue
            taken = hours(layout).expected if hours is not None else 0.0
            fitting.append((layout, most, taken))
            if limit is None or taken <= limit:
                return layout, _why(request, layout, most, taken)
            break  # further stages save memory, not time
    if fitting:
        layout, most, taken = min(fitting, key=lambda entry: entry[2])
        why = _why(request, layout, most, taken)
        why["ranks"] = (
            f"{layout.ranks}, on which it ends soonest: no number that divides the batch ends within the {limit:g} h "
            f"of a job, so it is requeued on the way"
        )
        return layout, why
    if starved is not None:
        layout, most = starved
        text = "the fewest that GPUs hold, though the host's memory is short"
    else:
        ranks = max(_possible_ranks(request))
        stage, checkpointed = list(_ways(request.choice, ranks))[-1]
        layout, _, most = request.largest(ranks, stage, checkpointed=checkpointed)
        high, free = request.memory(layout).gib.high, request.free_gib(ranks)
        text = f"the most there are: even so it may take {high:.3g} GiB a rank, and there are {free:.3g}"
    return layout, {
        "ranks": f"{layout.ranks}, {text}",
        "micro_batch": _why_micro_batch(request, layout, most),
    }


def _possible_ranks(request: _Request) -> list[int]:
    """Return the numbers of ranks that divide the batch and share nodes evenly, ascending."""
    a_node = ranks_a_node(request.cluster, request.threads)
    most = 1 if request.cluster.has_slices else a_node * request.cluster.nodes
    return [
        ranks
        for ranks in divisors(request.run.batch)
        if ranks <= most and (ranks <= a_node or ranks % a_node == 0)
    ]


def _ways(choice: ResourceChoice, ranks: int) -> Iterator[tuple[int, bool]]:
    """Yield the ZeRO stages and activation checkpointing to try, the fastest first."""
    stages = (0, 1, 2, 3) if ranks > 1 else (0,)
    if choice.zero_stage is not None:
        stages = (choice.zero_stage,)
    asked = choice.activation_checkpointing
    for checkpointed in (False, True) if asked is None else (asked,):
        for stage in stages:
            yield stage, checkpointed


def _why(request: _Request, layout: Layout, most: int | None, taken: float) -> dict[str, str]:
    limit = request.cluster.hours
    kind = "GPU" if request.cluster.gpus else "rank"
    within = f" and ends within the {limit:g} h of a job (about {taken:.3g} h)" if limit and taken else ""
    why = {"ranks": f"{layout.ranks}, the fewest on which it fits{within}"}
    peak, free = request.memory(layout).gib, request.free_gib(layout.ranks)
    room = f"{peak.high:.3g} GiB a {kind} at the high end" + ("" if free is None else f", of {free:.3g}")
    if request.choice.zero_stage is None:
        lower = "the lowest that fits" if layout.zero_stage else "nothing has to be divided among ranks"
        why["zero_stage"] = f"{layout.zero_stage}, {lower}: {room}"
    if layout.activation_checkpointing and request.choice.activation_checkpointing is None:
        why["activation_checkpointing"] = f"on, since on {layout.ranks} {kind}s no ZeRO stage fits without"
    why["micro_batch"] = _why_micro_batch(request, layout, most)
    return why


def _why_micro_batch(request: _Request, layout: Layout, most: int | None) -> str:
    peak, free = request.memory(layout).gib, request.free_gib(layout.ranks)
    micro = f"{layout.micro_batch} x {layout.accumulation}"
    if most is not None and layout.micro_batch <= max(1, most):
        return f"{micro}, since a larger one ran out of memory before"
    if request.choice.micro_batch:
        return f"{micro}, the largest that divides the batch up to resources.micro_batch {request.choice.micro_batch}"
    if not request.fits(layout):
        return f"{micro}, though it may take {peak.high:.3g} GiB of {free:.3g}: nothing smaller is left"
    if layout.accumulation == 1:
        return f"{micro}, a rank's whole share of the batch: {peak.high:.3g} GiB at the high end"
    return f"{micro}, the largest that fits: {peak.high:.3g} GiB of {free:.3g} at the high end"


def _fraction(request: _Request, layout: Layout) -> float:
    """Return the share of a GPU that a Series of one rank needs; 1 on the CPU and for several ranks."""
    free = request.cluster.gpu_memory_gib
    if not request.cluster.gpus or free is None or layout.ranks > 1:
        return 1.0
    high, host = request.memory(layout).gib.high, request.cluster.gpus * request.host_gib(layout)
    there = CPU_SHARE * request.cluster.memory_gib
    return 1 / next(n for n in FRACTIONS if n == 1 or (high * n <= free and host * n <= there))


def _shape(run: Run, layout: Layout) -> str:
    """Return the digest of all that decides a rank's memory except its micro-batch, twelve hex digits."""
    fields = {
        "model": run.model.model_dump(mode="json"),
        "frames": run.frames,
        "precision": run.precision,
        "ranks": layout.ranks,
        "zero_stage": layout.zero_stage,
        "activation_checkpointing": layout.activation_checkpointing,
    }
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]


def remember(
    study_dir: Path, run: Run, layout: Layout, device: str, device_name: str | None, *, alone: bool = True
) -> None:
    """Record that a layout's micro-batch did not fit; any rank may call it, since a line is written whole.

    `alone` is False if other work took memory of the device: later starts of this Series alone then begin smaller.
    """
    make_folder(study_dir)
    fields = {
        "t": round(time.time(), 3),
        "event": "out_of_memory",
        "series": run.series_id,
        "shape": _shape(run, layout),
        "micro_batch": layout.micro_batch,
        "device": device.split(":", maxsplit=1)[0],
        "device_name": device_name,
        "alone": alone,
    }
    path = study_dir / NAME
    with appending(path) as descriptor:
        append_line(descriptor, json.dumps(fields).encode() + b"\n", path, durable=True)


def without_kernels(run: Run, layout: Layout, gib: float) -> Layout:
    """Return the layout with the largest micro-batch that fits into so many GiB of a GPU without mixers' kernels."""
    for micro in reversed([one for one in divisors(run.batch // layout.ranks) if one <= layout.micro_batch]):
        tried = _with_micro_batch(run, layout, micro)
        if micro == 1 or memory(run, tried, on_cuda=True, is_fused=False).gib.high <= gib:
            break
    return tried


def what_would_fit(run: Run, layout: Layout, *, on_cuda: bool) -> str:
    """Describe, in one sentence, changes that need clearly less memory than a micro-batch of 1 does now.

    layout: that of an attempt, which knows its kernels.
    """
    fused = on_cuda and layout.fuses_mixers

    def peak(**changes: int | bool) -> float:
        asked = layout.model_copy(update={"micro_batch": 1, **changes})
        asked = asked.model_copy(update={"accumulation": max(1, run.batch // asked.ranks)})
        return memory(run, asked, on_cuda=on_cuda, is_fused=fused).gib.expected

    now = peak()
    text = f"no memory for a micro-batch of 1, which takes about {now:.3g} GiB a rank"
    ways: list[tuple[str, dict[str, int | bool]]] = []
    if not layout.activation_checkpointing:
        ways.append(("activation_checkpointing: true", {"activation_checkpointing": True}))
    for ranks, stage in product((layout.ranks, 2 * layout.ranks, 4 * layout.ranks), (2, 3)):
        if ranks > 1 and run.batch % ranks == 0 and (ranks, stage) > (layout.ranks, layout.zero_stage):
            ways.append((f"ranks: {ranks}, zero_stage: {stage}", {"ranks": ranks, "zero_stage": stage}))
    found = [(words, needed) for words, changes in ways if (needed := peak(**changes)) < 0.85 * now]
    if not found:
        return f"{text}; only more memory a rank helps a model of this size"
    listed = ", or ".join(f"resources: {{{words}}} (about {needed:.3g} GiB)" for words, needed in found[:3])
    return f"{text}; what takes less: {listed}"
