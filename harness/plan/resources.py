"""Resources of a Series: the fewest GPUs on which it fits and ends in time, and of these the layout that costs least.

Resources never change an experiment: the global batch is met exactly by micro-batch x accumulation x ranks. What a
study asks for is taken as it is; each choice that is made here comes with a sentence that says why.

Micro-batches that did not fit are remembered in ROOT/studies/NAME/out_of_memory.jsonl, a line for each time a rank ran
out, so that no later Series of that shape tries them again. A shape is everything but the micro-batch that decides the
memory of a rank; seeds, learning rates and iterations do not.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.common.disk import append_line, make_folder
from harness.common.format import Estimate
from harness.common.jsonl import Damage, LineReader
from harness.plan.cluster import Cluster, choose_layout, divisors, ranks_a_node
from harness.plan.memory import Memory, memory
from harness.plan.speed import same_device
from harness.record.root import Layout
from harness.study.run import Run
from harness.study.schema import ResourceChoice
from ssmttm.errors import InputError

FRACTIONS = (1, 2, 3, 4, 8)
"""Into how many a GPU may be shared."""
CPU_SHARE = 0.5
"""Share of a machine's memory that its ranks may fill: the rest is the process's own, and other people's."""
HoursOf = Callable[[Layout], Estimate]
"""Predicts the hours of a whole Series on a layout."""


@dataclass(frozen=True)
class Resources:
    """The resources of a Series, and why these."""

    layout: Layout
    memory: Memory
    gpu_fraction: float
    """Share of a GPU it needs: below 1 where several Series could share one; for a dispatcher that packs."""
    why: dict[str, str]
    """A sentence for each key of the layout that was chosen."""


class Refused:
    """A study's record of micro-batches that did not fit."""

    def __init__(self, study_dir: Path) -> None:
        self._told: dict[str, list[tuple[int, str, str | None]]] = {}
        path = study_dir / NAME
        if not path.exists():
            return
        for line in LineReader(path).read(_check):
            if not isinstance(line, Damage):
                entry = (line["micro_batch"], line["device"], line.get("device_name"))
                self._told.setdefault(line["shape"], []).append(entry)

    def most(self, run: Run, layout: Layout, kind: str, device_name: str | None) -> int | None:
        """The largest micro-batch to try on such a device, half of the smallest that failed; None where none did.

        0 where a micro-batch of 1 did not fit.
        """
        failed = [
            micro
            for micro, device, name in self._told.get(shape_of(run, layout), ())
            if device == kind and same_device(device_name, name)
        ]
        return min(failed) // 2 if failed else None


@dataclass(frozen=True)
class _Need:
    run: Run
    choice: ResourceChoice
    cluster: Cluster
    refused: Refused | None

    @property
    def threads(self) -> int:
        return self.choice.threads or 1

    def free_gib(self, ranks: int) -> float | None:
        """GiB a rank may take; None where that is not known."""
        if self.cluster.gpus:
            return self.cluster.gpu_memory_gib
        nodes = self.cluster.nodes
        slots = max(1, nodes * self.cluster.cores // (ranks * self.threads))
        return CPU_SHARE * nodes * self.cluster.memory_gib / (slots * ranks)

    def memory(self, layout: Layout) -> Memory:
        return memory_on(self.run, layout, on_cuda=self.cluster.gpus > 0)

    def fits(self, layout: Layout) -> bool:
        """True if the high end of its memory is there."""
        free = self.free_gib(layout.ranks)
        return free is None or self.memory(layout).gib.high <= free

    def largest(self, ranks: int, stage: int, *, checkpointed: bool) -> tuple[Layout, bool, int | None]:
        """The layout with the largest micro-batch that fits, whether it does, and the limit that a failure set."""
        layout = choose_layout(self.run.batch, ranks, self.run.batch, stage, self.threads)
        layout = layout.model_copy(update={"activation_checkpointing": checkpointed})
        device = self.cluster.device(self.run.precision, self.threads)
        most = self.refused.most(self.run, layout, device.kind, device.name) if self.refused else None
        if self.choice.micro_batch:
            asked = min(self.choice.micro_batch, self.choice.micro_batch if most is None else max(1, most))
            layout = _with_micro_batch(self.run, layout, asked)
            return layout, self.fits(layout) and most != 0, most
        share = self.run.batch // ranks
        for micro in sorted(divisors(share), reverse=True):
            tried = _with_micro_batch(self.run, layout, micro)
            if (most is None or micro <= most) and self.fits(tried):
                return tried, True, most
        return _with_micro_batch(self.run, layout, 1), False, most


def memory_on(run: Run, layout: Layout, *, on_cuda: bool) -> Memory:
    """The memory of a rank that trains a Run on a layout."""
    return memory(
        run.model,
        frames=run.frames,
        micro_batch=layout.micro_batch,
        accumulation=layout.accumulation,
        ranks=layout.ranks,
        zero_stage=layout.zero_stage,
        checkpointed=layout.activation_checkpointing,
        precision=run.precision,
        on_cuda=on_cuda,
    )


def choose_resources(
    run: Run,
    choice: ResourceChoice,
    cluster: Cluster,
    *,
    refused: Refused | None = None,
    hours: HoursOf | None = None,
) -> Resources:
    """The resources of a Series here; `refused` is what ran out of memory before, `hours` decides on automatic ranks.

    Raises InputError where the machine has too few devices or cores for the ranks asked for.
    """
    need = _Need(run, choice, cluster, refused)
    if choice.ranks is None:
        layout, why = _fewest(need, hours)
    else:
        _check_ranks(choice.ranks, cluster, need.threads)
        stage, checkpointed = choice.zero_stage or 0, bool(choice.activation_checkpointing)
        layout, fits, most = need.largest(choice.ranks, stage, checkpointed=checkpointed)
        why = {"ranks": f"{choice.ranks}, as resources.ranks says"}
        why["micro_batch"] = _why_micro_batch(need, layout, fits=fits, most=most)
    fraction = _fraction(need, layout)
    if fraction < 1:
        why["gpu_fraction"] = f"{fraction:.3g} of a GPU's memory holds it, at the high end of the estimate"
    return Resources(layout, need.memory(layout), fraction, why)


def _check_ranks(ranks: int, cluster: Cluster, threads: int) -> None:
    a_node = ranks_a_node(cluster, threads)
    if ranks > cluster.nodes * a_node:
        kind = "GPUs" if cluster.gpus else "cores"
        raise InputError(
            f"resources.ranks: {ranks}: {cluster.name} has {cluster.nodes * a_node} {kind} to a job"
        )
    if ranks % (nodes := -(-ranks // a_node)):
        raise InputError(
            f"resources.ranks: {ranks}: does not divide among the {nodes} nodes of {cluster.name} it takes"
        )


def _with_micro_batch(run: Run, layout: Layout, micro_batch: int) -> Layout:
    chosen = choose_layout(run.batch, layout.ranks, micro_batch, layout.zero_stage, layout.threads)
    return layout.model_copy(update={"micro_batch": chosen.micro_batch, "accumulation": chosen.accumulation})


def _fewest(need: _Need, hours: HoursOf | None) -> tuple[Layout, dict[str, str]]:
    """The fewest ranks on which a Series fits and ends within a job's time; where none is enough, the best there is."""
    limit = need.cluster.hours
    fitting: list[tuple[Layout, int | None, float]] = []
    for ranks in _possible_ranks(need):
        for stage, checkpointed in _ways(need.choice, ranks):
            layout, fits, most = need.largest(ranks, stage, checkpointed=checkpointed)
            if not fits:
                continue
            taken = hours(layout).expected if hours is not None else 0.0
            fitting.append((layout, most, taken))
            if limit is None or taken <= limit:
                return layout, _why(need, layout, most, taken)
            break  # further stages save memory, not time
    if fitting:
        layout, most, taken = min(fitting, key=lambda entry: entry[2])
        why = _why(need, layout, most, taken)
        why["ranks"] = (
            f"{layout.ranks}, on which it ends soonest: no number that divides the batch ends within the {limit:g} h "
            f"of a job, so it is requeued on the way"
        )
        return layout, why
    ranks = max(_possible_ranks(need))
    stage, checkpointed = list(_ways(need.choice, ranks))[-1]
    layout, _, most = need.largest(ranks, stage, checkpointed=checkpointed)
    high, free = need.memory(layout).gib.high, need.free_gib(ranks)
    text = f"the most there are: even so it may take {high:.3g} GiB a rank, and there are {free:.3g}"
    return layout, {
        "ranks": f"{ranks}, {text}",
        "micro_batch": _why_micro_batch(need, layout, fits=False, most=most),
    }


def _possible_ranks(need: _Need) -> list[int]:
    """Numbers of ranks that divide the batch and share nodes evenly, rising."""
    a_node = ranks_a_node(need.cluster, need.threads)
    most = a_node * need.cluster.nodes
    return [
        ranks
        for ranks in sorted(divisors(need.run.batch))
        if ranks <= most and (ranks <= a_node or ranks % a_node == 0)
    ]


def _ways(choice: ResourceChoice, ranks: int) -> Iterator[tuple[int, bool]]:
    """ZeRO stages and activation checkpointing to try, what costs least time first."""
    stages = (0, 1, 2, 3) if ranks > 1 else (0,)
    if choice.zero_stage is not None:
        stages = (choice.zero_stage,)
    asked = choice.activation_checkpointing
    for checkpointed in (False, True) if asked is None else (asked,):
        for stage in stages:
            yield stage, checkpointed


def _why(need: _Need, layout: Layout, most: int | None, taken: float) -> dict[str, str]:
    limit = need.cluster.hours
    kind = "GPU" if need.cluster.gpus else "rank"
    within = f" and ends within the {limit:g} h of a job (about {taken:.3g} h)" if limit and taken else ""
    why = {"ranks": f"{layout.ranks}, the fewest on which it fits{within}"}
    peak, free = need.memory(layout).gib, need.free_gib(layout.ranks)
    room = f"{peak.high:.3g} GiB a {kind} at the high end" + ("" if free is None else f", of {free:.3g}")
    if need.choice.zero_stage is None:
        lower = "the lowest that fits" if layout.zero_stage else "nothing has to be divided among ranks"
        why["zero_stage"] = f"{layout.zero_stage}, {lower}: {room}"
    if layout.activation_checkpointing and need.choice.activation_checkpointing is None:
        why["activation_checkpointing"] = f"on, since on {layout.ranks} {kind}s no ZeRO stage fits without"
    why["micro_batch"] = _why_micro_batch(need, layout, fits=True, most=most)
    return why


def _why_micro_batch(need: _Need, layout: Layout, *, fits: bool, most: int | None) -> str:
    peak, free = need.memory(layout).gib, need.free_gib(layout.ranks)
    micro = f"{layout.micro_batch} x {layout.accumulation}"
    if most is not None and layout.micro_batch <= max(1, most):
        return f"{micro}, since a larger one ran out of memory before"
    if need.choice.micro_batch:
        return f"{micro}, the largest that divides the batch up to resources.micro_batch {need.choice.micro_batch}"
    if not fits:
        return f"{micro}, though it may take {peak.high:.3g} GiB of {free:.3g}: nothing smaller is left"
    if layout.accumulation == 1:
        return f"{micro}, a rank's whole share of the batch: {peak.high:.3g} GiB at the high end"
    return f"{micro}, the largest that fits: {peak.high:.3g} GiB of {free:.3g} at the high end"


def _fraction(need: _Need, layout: Layout) -> float:
    """Share of a GPU that a Series of one rank needs, as one of a few; 1 on the CPU and for several ranks."""
    free = need.cluster.gpu_memory_gib
    if not need.cluster.gpus or free is None or layout.ranks > 1:
        return 1.0
    high = need.memory(layout).gib.high
    return 1 / max(parts for parts in FRACTIONS if parts == 1 or high * parts <= free)


NAME = "out_of_memory.jsonl"


def shape_of(run: Run, layout: Layout) -> str:
    """Digest of all that decides a rank's memory beside its micro-batch, twelve hex digits."""
    fields = {
        "model": run.model.model_dump(mode="json"),
        "frames": run.frames,
        "precision": run.precision,
        "ranks": layout.ranks,
        "zero_stage": layout.zero_stage,
        "activation_checkpointing": layout.activation_checkpointing,
    }
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]


def remember(study_dir: Path, run: Run, layout: Layout, device: str, device_name: str | None) -> None:
    """Write down that a layout's micro-batch did not fit; any rank may, since a line is written whole."""
    make_folder(study_dir)
    fields = {
        "t": round(time.time(), 3),
        "event": "out_of_memory",
        "series": run.series_id,
        "shape": shape_of(run, layout),
        "micro_batch": layout.micro_batch,
        "device": device.split(":", maxsplit=1)[0],
        "device_name": device_name,
    }
    path = study_dir / NAME
    descriptor = os.open(path, os.O_CREAT | os.O_APPEND | os.O_RDWR, 0o644)
    try:
        append_line(descriptor, json.dumps(fields).encode() + b"\n", path, durable=True)
    finally:
        os.close(descriptor)


def _check(fields: dict[str, object]) -> None:
    for name, kind in (("shape", str), ("micro_batch", int), ("device", str)):
        if not isinstance(fields.get(name), kind):
            raise ValueError(f"{name}: is missing or no {kind.__name__}")  # noqa: TRY004


def what_would_fit(run: Run, layout: Layout, *, on_cuda: bool) -> str:
    """A sentence for a Series whose micro-batch of 1 does not fit: the changes that would need clearly less."""

    def peak(**changes: int | bool) -> float:
        asked = layout.model_copy(update={"micro_batch": 1, **changes})
        asked = asked.model_copy(update={"accumulation": max(1, run.batch // asked.ranks)})
        return memory_on(run, asked, on_cuda=on_cuda).gib.expected

    now = peak()
    text = f"no memory for a micro-batch of 1, which takes about {now:.3g} GiB a rank"
    found = [
        (words, needed)
        for words, changes in _remedies(run, layout)
        if (needed := peak(**changes)) < 0.85 * now
    ]
    if not found:
        return f"{text}; nothing but more memory a rank helps a model of this size"
    ways = ", or ".join(f"resources: {{{words}}} (about {needed:.3g} GiB)" for words, needed in found[:3])
    return f"{text}; what takes less: {ways}"


def _remedies(run: Run, layout: Layout) -> Sequence[tuple[str, dict[str, int | bool]]]:
    ways: list[tuple[str, dict[str, int | bool]]] = []
    if not layout.activation_checkpointing:
        ways.append(("activation_checkpointing: true", {"activation_checkpointing": True}))
    for ranks in (layout.ranks, 2 * layout.ranks, 4 * layout.ranks):
        if ranks > 1 and run.batch % ranks == 0:
            ways += [
                (f"ranks: {ranks}, zero_stage: {stage}", {"ranks": ranks, "zero_stage": stage})
                for stage in (2, 3)
                if (ranks, stage) > (layout.ranks, layout.zero_stage)
            ]
    return ways
