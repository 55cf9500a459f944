"""Micro-batches that did not fit: remembered with the study, so that no later Series of that shape tries them again.

ROOT/studies/NAME/out_of_memory.jsonl has a line for each time a rank ran out. A shape is everything but the micro-batch
that decides the memory of a rank; seeds, learning rates and iterations do not.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

from harness.disk import append_line, make_folder
from harness.lines import Damage, LineReader
from harness.memory import memory
from harness.run import Run
from harness.rundir import Layout
from harness.speed import same_device

NAME = "out_of_memory.jsonl"
STOPPED = "out of memory"
"""What the reason of a journal's preempted event begins with, where a Series goes on with a smaller micro-batch."""
WORDS = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA out of memory",
    "could not create a primitive",
)
"""What torch says in plain RuntimeErrors where memory is short; the last is oneDNN's, which gives no reason."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is short, on whatever device."""
    named = type(error).__name__ == "OutOfMemoryError"  # torch's, without importing torch to ask
    said = isinstance(error, RuntimeError) and any(words in str(error) for words in WORDS)
    return isinstance(error, MemoryError) or named or said


def shape_of(run: Run, layout: Layout) -> str:
    """What decides a rank's memory beside its micro-batch, as twelve hex digits."""
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


class Refused:
    """What a study remembers of micro-batches that did not fit."""

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


def _check(fields: dict[str, object]) -> None:
    for name, kind in (("shape", str), ("micro_batch", int), ("device", str)):
        if not isinstance(fields.get(name), kind):
            raise ValueError(f"{name}: is missing or no {kind.__name__}")  # noqa: TRY004


def what_would_fit(run: Run, layout: Layout, *, on_cuda: bool) -> str:
    """A sentence for a Series whose micro-batch of 1 does not fit: the changes that would need clearly less."""

    def peak(**changes: int | bool) -> float:
        asked = layout.model_copy(update=changes)
        return memory(
            run.model,
            frames=run.frames,
            micro_batch=1,
            accumulation=max(1, run.batch // asked.ranks),
            ranks=asked.ranks,
            zero_stage=asked.zero_stage,
            checkpointed=asked.activation_checkpointing,
            precision=run.precision,
            on_cuda=on_cuda,
        ).gib.expected

    now = peak()
    text = f"no memory for a micro-batch of 1, which takes about {now:.3g} GiB a rank"
    found = [
        (words, needed) for words, changes in _ways(run, layout) if (needed := peak(**changes)) < 0.85 * now
    ]
    if not found:
        return f"{text}; nothing but more memory a rank helps a model of this size"
    ways = ", or ".join(f"resources: {{{words}}} (about {needed:.3g} GiB)" for words, needed in found[:3])
    return f"{text}; what takes less: {ways}"


def _ways(run: Run, layout: Layout) -> Sequence[tuple[str, dict[str, int | bool]]]:
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
