"""The layout a Series is trained on: what its checkpoints and its earlier attempts leave to be chosen.

Resuming is exact on the layout that was interrupted and on no other. So whatever memory was judged to allow this
time, the micro-batch stays; where something else has changed, it is said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from harness.plan.cluster import choose_layout
from harness.plan.resources import Refused
from harness.record import checkpoints
from harness.record.journal import read_progress
from harness.record.root import Launch, Layout, Root
from harness.study.run import Run
from harness.train.ranks import Ranks, device_name

EXACT = ("ranks", "micro_batch", "zero_stage", "threads", "kernels")
"""Keys of a layout whose values change floating-point order."""


def series_layout(root: Root, runs: Sequence[Run], launch: Launch, ranks: Ranks) -> tuple[Layout, list[str]]:
    """The layout this process group trains a Series on, and in what it differs from the newest earlier attempt's.

    The ZeRO stage is that of the Series' checkpoints, if there are any; the micro-batch that of the newest earlier
    attempt on as many ranks, unless it is above what this launch allows or what has run out of memory: once a
    micro-batch of 1 has, it is tried again, since memory may have been freed.
    """
    from ssmttm.model.kernels import chosen

    series = root.series(runs[0].series_id)
    folders = [series, *(root.run(run.run_id) for run in runs)]
    held = [found for folder in folders for found in checkpoints.marked(folder / "checkpoints")]
    newest, started = ranks.broadcast((held[-1].marker if held else None, read_progress(series).started))
    stage = launch.zero_stage if newest is None else newest.zero_stage
    earlier = {} if started is None else started.get("layout", {})
    micro_batch = launch.micro_batch
    if earlier.get("ranks") == ranks.world:
        micro_batch = min(micro_batch, earlier.get("micro_batch", micro_batch))
    layout = choose_layout(runs[0].batch, ranks.world, micro_batch, stage, launch.threads)
    layout = layout.model_copy(
        update={"kernels": chosen().name, "activation_checkpointing": launch.activation_checkpointing}
    )
    layout = ranks.broadcast(_within_memory(runs[0], layout, launch, ranks.device))
    return layout, _differences(started or {}, layout, ranks.device)


def _within_memory(run: Run, layout: Layout, launch: Launch, device: str) -> Layout:
    refused = Refused(launch.control.parent)
    most = refused.most(run, layout, device.split(":", maxsplit=1)[0], device_name(device))
    if most is None:
        return layout
    micro = choose_layout(run.batch, layout.ranks, max(1, min(most, layout.micro_batch)), 0, 1)
    return layout.model_copy(update={"micro_batch": micro.micro_batch, "accumulation": micro.accumulation})


def _differences(started: Mapping[str, Any], layout: Layout, device: str) -> list[str]:
    before = {key: value for key, value in started.get("layout", {}).items() if key in EXACT}
    now = layout.model_dump(include=set(EXACT))
    if "device" in started:
        before["device"], now["device"] = started["device"].split(":")[0], device.split(":", maxsplit=1)[0]
    return [
        f"{key} {now[key]} where the attempt before had {before[key]}: its losses are met to rounding alone"
        for key in now
        if key in before and before[key] != now[key]
    ]
