"""Time of a step by kinds of kernels, and memory that an engine leaves behind."""

from __future__ import annotations

from collections import Counter

import torch
from torch.profiler import ProfilerActivity, profile

from tests.gpu.engines import engine_of, seconds_of_steps
from tests.gpu.report import note, verdict
from tests.gpu.sizes import DEVICE, Size

KINDS = {
    "scan": ("_chunk", "_state_passing"),
    "convolution": ("causal_conv1d",),
    "gated norm": ("_layer_norm",),
    "products": ("gemm", "nvjet", "cutlass", "xmma", "ampere_", "aten::mm", "aten::addmm"),
    "attention": ("flash", "fmha", "cudnn", "attention"),
    "optimiser": ("multi_tensor", "adam", "foreach"),
    "dropout": ("dropout", "bernoulli"),
    "copies": ("memcpy", "memset", "copy"),
}
"""Kinds of kernels by parts of their names, the first that fits."""


def where(size: Size) -> None:
    """Report the time of a step by kinds of kernels, and its largest kernels."""
    activity, time_of = (
        (ProfilerActivity.CUDA, "self_device_time_total")
        if DEVICE == "cuda"
        else (ProfilerActivity.CPU, "self_cpu_time_total")
    )
    for architecture in ("prefix_simba", "cross_transformer"):
        with engine_of(size, architecture) as engine:
            seconds_of_steps(size, engine, 2)
            with profile(activities=[activity]) as seen:
                (step,) = seconds_of_steps(size, engine, 1)
        spent: Counter[str] = Counter()
        largest: Counter[str] = Counter()
        for event in seen.key_averages():
            kind = next(
                (k for k, words in KINDS.items() if any(w in event.key.lower() for w in words)), "the rest"
            )
            spent[kind] += getattr(event, time_of) / 1e3
            largest[f"{event.key[:90]} x{event.count}"] = getattr(event, time_of) / 1e3
        parts = ", ".join(f"{kind} {ms:.1f}" for kind, ms in spent.most_common())
        note(f"{architecture}: {step * 1e3:.0f} ms a step, kernels {spent.total():.0f} ms: {parts}")
        for name, ms in largest.most_common(12):
            note(f"  {ms:8.1f} ms {name}")


def leak(size: Size) -> None:
    """Hold memory after the third engine to that after the first; under ZeRO 3, processes end instead."""
    for stage in range(4):
        held = []
        for _ in range(3):
            with engine_of(size, "cross_transformer", blocks=2, zero_stage=stage) as engine:
                seconds_of_steps(size, engine, 2)
            del engine
            held.append(torch.cuda.memory_allocated() / 2**20 if DEVICE == "cuda" else 0.0)
        text = (
            f"ZeRO {stage}: MiB held after each of three engines: {', '.join(f'{mib:.0f}' for mib in held)}"
        )
        if stage == 3:
            note(text)
        else:
            verdict(held[2] <= held[0] + 1, text)
