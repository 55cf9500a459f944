"""Speed and memory of training, through the engine that studies use."""

from __future__ import annotations

import math
from unittest import mock

import numpy as np
import torch

import ssmttm.model.kernels
from harness.common.format import GIB
from harness.plan.memory import memory
from harness.train import compiling
from ssmttm.model.flops import training_flops
from tests.benchmarks.gpu import product_speed
from tests.gpu.engines import engine_of, median_step, seconds_of_steps
from tests.gpu.report import note, verdict
from tests.gpu.sizes import (
    BLOCKS,
    CHECKPOINTED_PEAK_GIB,
    DEVICE,
    PEAK_GIB,
    PREDICTED_FOR,
    TOKENS_PER_SECOND,
    TOLERANCE,
    Size,
)


def speed(size: Size) -> None:
    """Train the four backbones for some steps; hold speed to the prediction, and memory to the plan and to that."""
    ceiling = product_speed(size.product, DEVICE, 5)
    note(f"bf16 product of {size.product} rows: {ceiling / 1e12:.0f} TFLOP/s; MFU below is a share of it")
    for architecture in BLOCKS:
        _measure(size, architecture, ceiling)
    _measure(size, "prefix_simba", ceiling, checkpointed=True)


def _measure(size: Size, architecture: str, ceiling: float, *, checkpointed: bool = False) -> None:
    on_cuda = DEVICE == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with engine_of(size, architecture, 2, activation_checkpointing=checkpointed) as engine:
        first, _, *others = seconds_of_steps(size, engine, 8)
        run, layout, step = engine.run, engine.layout, float(np.median(others))
        peak = (torch.cuda.max_memory_allocated() - before) if on_cuda else math.nan
    tokens = run.tokens_a_step / step
    flops = training_flops(run.model, size.frames, size.text) * run.batch * size.frames / step
    name = architecture + (", checkpointed" if checkpointed else "")
    note(
        f"{name}: {tokens:,.0f} tokens/s, {step * 1e3:.0f} ms a step of {run.batch}, MFU {flops / ceiling:.1%}, "
        f"{flops / 1e12:.0f} TFLOP/s; first step {first:.1f} s"
    )
    planned = memory(run, layout, on_cuda=on_cuda)
    bounds = planned.peak.low, planned.peak.expected, planned.peak.high
    low, expected, high = ((bound - planned.fixed) / GIB for bound in bounds)
    text = f"{name}: peak {peak / GIB:.2f} GiB, planned {expected:.2f} ({low:.2f} to {high:.2f})"
    if not on_cuda:
        note(f"{text}; a CPU tells no peak")
        return
    verdict(low <= peak / GIB <= high, f"{text}, measured over planned {peak / GIB / expected:.2f}")
    if PREDICTED_FOR not in torch.cuda.get_device_name():
        return
    foreseen = CHECKPOINTED_PEAK_GIB if checkpointed else PEAK_GIB[architecture]
    ratio = peak / GIB / foreseen
    verdict(abs(ratio - 1) <= TOLERANCE, f"{name}: peak over predicted {ratio:.2f} ({foreseen} GiB)")
    if not checkpointed:
        ratio = tokens / TOKENS_PER_SECOND[architecture]
        verdict(ratio >= 1 - TOLERANCE, f"{name}: tokens/s over predicted {ratio:.2f}")


def chunks(size: Size) -> None:
    """Time Prefix SiMBA with other chunks of the scan."""
    for chunk in (256, 512):
        with (
            mock.patch.object(ssmttm.model.kernels, "scan_chunk", return_value=chunk),
            engine_of(size, "prefix_simba") as engine,
        ):
            note(f"chunk {chunk}: {median_step(size, engine) * 1e3:.0f} ms a step of {size.micro_batch}")


def compiled(size: Size) -> None:
    """Time training with each block compiled, against blocks as they are."""
    backend = compiling.BACKEND if DEVICE == "cuda" else "eager"
    for architecture in ("cross_transformer", "prefix_simba"):
        with engine_of(size, architecture, compiled=False) as engine:
            plain = median_step(size, engine)
        with (
            mock.patch.object(compiling, "BACKEND", backend),
            engine_of(size, architecture, compiled=True) as engine,
        ):
            (start,) = seconds_of_steps(size, engine, 1)
            step = median_step(size, engine)
        times = f"{step * 1e3:.0f} ms a step of {size.micro_batch}, as it is {plain * 1e3:.0f} ms"
        note(f"{architecture} compiled: {times}, ratio {plain / step:.2f}; the first takes {start:.0f} s")
