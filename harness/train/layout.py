"""The layout a Series trains on, as its checkpoints and its earlier attempts allow.

Resuming is exact on the interrupted layout alone. The micro-batch therefore stays as it was, even where this launch
would allow a larger one; every other difference becomes a warning in the journal.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from harness.common.format import GIB
from harness.plan.cluster import choose_layout
from harness.plan.resources import Refused, without_kernels
from harness.record import checkpoints
from harness.record.checkpoints import Marker
from harness.record.journal import read_progress
from harness.record.root import Launch, Layout, Root, layout_differences
from harness.study.run import Run
from harness.train.compiling import compiled_layout
from harness.train.device import CHOSEN
from harness.train.ranks import Ranks, device_name
from harness.train.stopping import GPU_SHARE

if TYPE_CHECKING:
    from ssmttm.model.kernels import Kernels


def series_layout(root: Root, runs: Sequence[Run], launch: Launch, ranks: Ranks) -> tuple[Layout, list[str]]:
    """Choose the layout of a Series on this process group; return it and its differences from the newest attempt's.

    The ZeRO stage is that of the Series' checkpoints, if there are any; the micro-batch that of the newest attempt on
    as many ranks, unless it exceeds what this launch allows or has run out of memory. A micro-batch of 1 that has run
    out of memory is tried again, since memory may have been freed.
    """
    from ssmttm.model.kernels import chosen

    series = root.series(runs[0].series_id)
    folders = [series, *(root.run(run.run_id) for run in runs)]
    held = [found for folder in folders for found in checkpoints.marked(folder / "checkpoints")]
    newest = ranks.broadcast(held[-1].marker if held else None, Marker | None)
    started = ranks.broadcast(read_progress(series).started, dict[str, Any] | None)
    stage = launch.zero_stage if newest is None else newest.zero_stage
    earlier = {} if started is None else started.get("layout", {})
    micro_batch = launch.micro_batch
    if earlier.get("ranks") == ranks.world:
        micro_batch = min(micro_batch, earlier.get("micro_batch", micro_batch))
    layout = choose_layout(runs[0].batch, ranks.world, micro_batch, stage, launch.threads)
    kernels = chosen()
    layout = layout.model_copy(
        update={"kernels": kernels.name, "activation_checkpointing": launch.activation_checkpointing}
    )
    planned, layout = layout, _without_kernels(runs[0], layout, launch, ranks.device, kernels)
    layout = ranks.broadcast(_within_memory(runs[0], layout, launch, ranks.device), Layout)
    layout, uncompiled = compiled_layout(runs[0], layout, launch, ranks, root)
    now = {"layout": layout.model_dump(), "device": ranks.device}
    return layout, [
        *_not_as_planned(runs[0], launch, ranks.device, kernels, planned, layout),
        *([] if uncompiled is None else [uncompiled]),
        *(
            f"{text} in the attempt before: losses agree to rounding, not to the bit"
            for text in layout_differences(started or {}, now)
        ),
    ]


def _lacks_kernels(run: Run, launch: Launch, device: str, kernels: Kernels) -> bool:
    """Return True if mixers run by PyTorch on a GPU where the plan counted on their kernels."""
    has_mixers = "mamba2" in run.model.architecture.sub_layers
    return has_mixers and launch.device == "cuda" and device.startswith("cuda") and kernels.mixer is None


def _without_kernels(run: Run, layout: Layout, launch: Launch, device: str, kernels: Kernels) -> Layout:
    """Return the layout that fits into this rank's GPU if PyTorch computes the mixers, else the layout itself."""
    if not _lacks_kernels(run, launch, device, kernels):
        return layout
    import torch

    _, total = torch.cuda.mem_get_info(device)
    return without_kernels(run, layout, float(os.environ.get(GPU_SHARE, "1")) * total / GIB)


def _not_as_planned(
    run: Run, launch: Launch, device: str, kernels: Kernels, planned: Layout, layout: Layout
) -> list[str]:
    """Describe where device and kernels are not those that the plan counted on."""
    found, kind = [], device.split(":", maxsplit=1)[0]
    if launch.device not in {None, kind}:
        names = {"cpu": "the CPU", "cuda": "a GPU"}
        why = f" ({CHOSEN})" if kind == "cpu" else ""
        found.append(f"trains on {names[kind]}{why}, where the plan counted on {names[str(launch.device)]}")
    if _lacks_kernels(run, launch, device, kernels):
        text = f"mixers by {kernels.name}: {kernels.reason}; the plan counted on the kernels of mamba-ssm, so steps "
        text += "take longer and more memory"
        if layout.micro_batch < planned.micro_batch:
            text += f": micro-batch {layout.micro_batch} and not {planned.micro_batch}"
        found.append(text)
    return found


def _within_memory(run: Run, layout: Layout, launch: Launch, device: str) -> Layout:
    refused = Refused(launch.control.parent)
    most = refused.most(run, layout, device.split(":", maxsplit=1)[0], device_name(device))
    if most is None:
        return layout
    micro = choose_layout(run.batch, layout.ranks, max(1, min(most, layout.micro_batch)), 0, 1)
    return layout.model_copy(update={"micro_batch": micro.micro_batch, "accumulation": micro.accumulation})
