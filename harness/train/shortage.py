"""Memory that has run out: the micro-batch is recorded, and the Series begins again with a smaller one.

A failure counts for all Series of a shape only if the rank had its device to itself: what other work takes of a GPU
says nothing of what fits there alone.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import psutil

from harness.plan.resources import CPU_SHARE, remember, what_would_fit
from harness.record.journal import Event, Journal
from harness.record.kinds import OUT_OF_MEMORY, Kind
from harness.record.root import Launch, Layout
from harness.study.run import Run
from harness.train.ranks import Ranks, device_name
from harness.train.stopping import EXIT_PREEMPTED, GPU_SHARE

log = logging.getLogger("ssmscale.worker")

OTHERS = 0.1
"""Share of a GPU's memory that the driver, the CUDA context, NCCL and a display may take beside torch."""


def note_shortage(
    run: Run,
    layout: Layout,
    launch: Launch,
    ranks: Ranks,
    folder: Path,
    journal: Journal | None,
    *,
    is_free: bool,
) -> str | None:
    """Record that a micro-batch did not fit; return why the Series fails if there is no smaller one, else None.

    The process exits if it is one of several ranks, since the others may wait for it, and unless the engine `is_free`,
    whose memory the next one would lack. The next start reads the record.
    """
    device = ranks.device
    study, alone = launch.control.parent, had_device_alone(ranks)
    remember(study, run, layout, device, device_name(device), alone=alone)
    text = f"{OUT_OF_MEMORY} with micro-batch {layout.micro_batch} on rank {ranks.rank}"
    if layout.micro_batch == 1:
        return what_would_fit(run, layout, on_cuda=device.startswith("cuda"))
    if ranks.world == 1 and is_free:
        if journal is not None:
            text = f"{text}; training resumes from the last checkpoint with a smaller one"
            journal.append(Event.WARNING, text=text)
        return None
    log.error("series %s: %s", run.series_id, text)
    (journal or Journal.open(folder)).leave(Kind.OUT_OF_MEMORY, text)
    raise SystemExit(EXIT_PREEMPTED)


def had_device_alone(ranks: Ranks) -> bool:
    """Return True if other work left this rank what the plan counts on: a whole GPU, or a machine's share for ranks.

    False where that cannot be told.
    """
    if ranks.device == "cpu":
        memory = psutil.virtual_memory()
        own = ranks.world * psutil.Process().memory_info().rss
        return bool(memory.total - memory.available - own < (1 - CPU_SHARE) * memory.total)
    if os.environ.get(GPU_SHARE):
        return False
    import torch

    try:
        free, total = torch.cuda.mem_get_info(ranks.device)
        return bool(total - free - torch.cuda.memory_reserved(ranks.device) < OTHERS * total)
    except RuntimeError:  # the context may be lost
        return False
