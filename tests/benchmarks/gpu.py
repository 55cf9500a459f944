"""A training step of all four backbones at the paper's size: tokens a second, share of the ceiling, peak memory.

Each variant (PyTorch's kernels, activation checkpointing, torch.compile) is a model of its own with the same weights,
compared with the model as it is. The ceiling is the speed of a large matrix product, in the precision of the step.

Studies are compiled on GPUs alone: on a CPU torch.compile takes two minutes to start, gains nothing (0.94 times as
fast) and changes gradients. Its row shows what it gains on a GPU.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ssmttm.model.architecture import ARCHITECTURES, Architecture
from ssmttm.model.config import ModelConfig
from ssmttm.model.flops import training_flops
from ssmttm.model.kernels import TORCH, Kernels, chosen
from ssmttm.model.loss import codebook_cross_entropy
from ssmttm.model.music_lm import MusicLM
from ssmttm.text.config import TextConfig
from ssmttm.text.text_batch import TextBatch
from tests.benchmarks.measure import Row, Work, as_ratio, by_turns
from tests.benchmarks.scan import peak_bytes
from tests.ssmttm.kernel_devices import using

TEXT_WIDTH = 768


@dataclass(frozen=True)
class Size:
    """Size of a step's model and batch, and of the matrix product that gives the ceiling."""

    n_blocks: int = 24
    d_model: int = 1024
    d_state: int = 512
    frames: int = 2588  # 30 s
    text_positions: int = 64
    batch: int = 4
    square: int = 8192


@dataclass(frozen=True)
class Variant:
    """One way to run a model."""

    kernels: Kernels
    checkpointed: bool = False
    compiler: str | None = None


@dataclass(frozen=True)
class Measured:
    """Seconds of a variant's step and its peak in bytes, or the problem that kept it from running."""

    step: float = math.nan
    peak: int = 0
    problem: str | None = None


def run(*, quick: bool) -> Iterator[Row]:
    """Yield all rows on the GPU, or one that says there is none."""
    if not torch.cuda.is_available():
        yield Row("gpu: skipped, since there is no CUDA device here", "", "", "")
        return
    size = Size(n_blocks=6) if quick else Size()
    yield from measure(size, "cuda", chosen(), rounds=3 if quick else 9)


def measure(
    size: Size, device: str, kernels: Kernels, *, rounds: int, compiler: str | None = "inductor"
) -> Iterator[Row]:
    """Yield the rows of all four backbones; `compiler` is a backend of torch.compile, or None."""
    ceiling = product_speed(size.square, device, rounds)
    yield Row(f"gpu: bf16 product of {size.square} x {size.square}", f"{ceiling / 1e12:.3g} TFLOP/s", "", "")
    yield Row(f"gpu: mixers by {kernels.name}", kernels.reason or "complete", "", "")
    for architecture in ARCHITECTURES:
        yield from _backbone(architecture, size, device, kernels, ceiling, rounds, compiler)


def _backbone(
    architecture: Architecture,
    size: Size,
    device: str,
    kernels: Kernels,
    ceiling: float,
    rounds: int,
    compiler: str | None,
) -> Iterator[Row]:
    config = ModelConfig(
        architecture=architecture,
        n_blocks=size.n_blocks,
        d_model=size.d_model,
        d_state=size.d_state,
        text=TextConfig(encoder="frozen", dim=TEXT_WIDTH, max_positions=size.text_positions),
    )
    variants = {
        "as it is": Variant(kernels),
        "by PyTorch": Variant(TORCH),
        "activation checkpointing": Variant(kernels, checkpointed=True),
    }
    if compiler is not None:
        variants["torch.compile"] = Variant(kernels, compiler=compiler)
    if not architecture.is_recurrent:
        del variants["by PyTorch"]
    found = {name: _measured(variant, config, size, device, rounds) for name, variant in variants.items()}

    tokens = size.batch * size.frames * config.n_codebooks
    flops = training_flops(config, size.frames, size.text_positions) * size.batch * size.frames
    own = found["as it is"]
    for name, each in found.items():
        what = f"{architecture} {name}"
        if each.problem is not None:
            yield Row(what, each.problem, "", "")
            continue
        share = flops / each.step / ceiling
        others, other_peak, faster, smaller = "", "", "", ""
        if each is not own and own.problem is None:
            others, other_peak = f"{tokens / own.step:.4g}", _as_size(own.peak)
            faster, smaller = f"{as_ratio(own.step / each.step)}, ", as_ratio(own.peak / each.peak)
        yield Row(
            f"{what}: tokens/s", f"{tokens / each.step:.4g}", others, f"{faster}{share:.0%} of the ceiling"
        )
        yield Row(f"{what}: peak memory", _as_size(each.peak), other_peak, smaller)


def _measured(variant: Variant, config: ModelConfig, size: Size, device: str, rounds: int) -> Measured:
    """Measure seconds and peak memory of a model of its own, which is freed afterwards."""
    with using(variant.kernels):
        try:
            step = training_step(variant, config, size, device)
            (seconds,) = by_turns(rounds, step)
            return Measured(float(np.median(seconds)), peak(step, device))
        except torch.OutOfMemoryError:
            return Measured(problem="out of memory")
        except torch._dynamo.exc.TorchDynamoException as error:
            return Measured(problem=f"not compiled: {str(error).splitlines()[0]}")
        finally:
            if device == "cuda":
                gc.collect()
                torch.cuda.empty_cache()


def training_step(variant: Variant, config: ModelConfig, size: Size, device: str) -> Work:
    """Return a step of training in bf16 with its optimiser; the step returns when the device has finished."""
    torch.manual_seed(0)
    model = MusicLM(config).to(device).train()
    model.checkpoints_activations = variant.checkpointed
    if variant.compiler is not None:
        for block in model.blocks:
            block.compile(backend=variant.compiler)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    shape = (size.batch, config.n_codebooks, size.frames)
    tokens = torch.randint(0, config.codebook_size, shape, device=device)
    text = TextBatch(
        torch.randn(size.batch, size.text_positions, TEXT_WIDTH),
        torch.ones(size.batch, size.text_positions, dtype=torch.bool),
        torch.zeros(size.batch, dtype=torch.bool),
    ).to(device)
    return partial(_step, model, optimiser, tokens, text)


def _step(model: MusicLM, optimiser: torch.optim.Optimizer, tokens: Tensor, text: TextBatch) -> float:
    with torch.autocast(tokens.device.type, torch.bfloat16):
        logits = model(tokens, text)
    codebook_cross_entropy(logits, tokens)[0].sum().div(tokens.numel()).backward()
    optimiser.step()
    optimiser.zero_grad()
    return float(next(model.parameters()).detach().view(-1)[0])  # waits for the device


def product_speed(square: int, device: str, rounds: int) -> float:
    """Return the FLOP/s of a product of two square matrices in bf16."""
    left, right = torch.randn(2, square, square, device=device, dtype=torch.bfloat16)

    def product() -> float:
        return float((left @ right)[0, 0])

    (seconds,) = by_turns(rounds, product)
    return 2 * square**3 / float(np.median(seconds))


def peak(step: Work, device: str) -> int:
    """Return the peak bytes of one step: with weights and moments on a GPU, beyond them on a CPU."""
    if device != "cuda":
        return peak_bytes(step)
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated()


def _as_size(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"
