"""Engines of the check: built as a worker builds them, and stepped on made batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from harness.plan.resources import is_compiled
from harness.record.root import Layout
from harness.train.engine import Engine, free_memory
from harness.train.ranks import initialise_ranks
from ssmttm.model.loss import codebook_cross_entropy
from tests.benchmarks.measure import clocked
from tests.gpu.sizes import DEVICE, Size


@contextmanager
def engine_of(
    size: Size, architecture: str, accumulation: int = 1, *, blocks: int | None = None, **layout: Any
) -> Iterator[Engine]:
    """Build an engine, and free it after the block; on a GPU its blocks are compiled, as those of studies are."""
    run = size.run(size.config(architecture, blocks), accumulation)
    compiled = is_compiled(None, layout.get("zero_stage", 0), on_cuda=DEVICE == "cuda")
    fields = {"micro_batch": size.micro_batch, "accumulation": accumulation, "compiled": compiled}
    engine = Engine(run, Layout.model_validate({**fields, **layout}), initialise_ranks(4))
    try:
        yield engine
    finally:
        engine.free()
        del engine
        free_memory()


def seconds_of_steps(size: Size, engine: Engine, count: int) -> list[float]:
    """Return the seconds of each optimiser step."""
    tokens = torch.randint(0, 1024, (size.micro_batch, 1, size.frames), device=DEVICE)
    text, accumulation = size.captions(size.micro_batch), engine.layout.accumulation

    def share() -> torch.Tensor:
        sums, _ = codebook_cross_entropy(engine.deepspeed(tokens, text), tokens, 0.1)
        return sums.sum() / (accumulation * tokens.numel())

    return [clocked(partial(finished, engine.step, [share] * accumulation, 1e-4)) for _ in range(count)]


def median_step(size: Size, engine: Engine) -> float:
    """Return the median seconds of five steps, after two that do not count."""
    return float(np.median(seconds_of_steps(size, engine, 7)[2:]))


def finished(work: Any, *arguments: Any) -> None:
    """Call a function, and return when the GPU has done all that it was given."""
    work(*arguments)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
