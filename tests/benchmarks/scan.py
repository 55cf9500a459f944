"""One Mamba-2 mixer forward and backward, against that of transformers without compiled kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from ssmttm.compat import keep_freed_memory
from ssmttm.model.architecture import Architecture
from ssmttm.model.chunks import even_chunk
from ssmttm.model.config import ModelConfig
from ssmttm.model.flops import forward_flops
from ssmttm.model.layers.layer import FlopConvention
from ssmttm.model.layers.mamba2 import Mamba2Mixer
from ssmttm.model.layers.sub_layer import Context
from ssmttm.model.ssd import ssd_scan
from ssmttm.text.config import TextConfig
from tests.benchmarks.measure import Row, Work, by_turns, times
from tests.ssmttm.model.test_blocks import reference_mixer

BATCH = 2
D_STATES = (64, 512)
LENGTHS = (1000, 2600)
REFERENCE_CHUNKS = (32, 64, 128, 256)  # up to the default of transformers
SQUARE = 1024  # the matrix product that stands for the machine's ceiling


def run(*, quick: bool) -> Iterator[Row]:
    """Yield time, memory and share of the ceiling, at each state width and length."""
    keep_freed_memory()  # as training processes do
    rounds = 3 if quick else 9
    for length in LENGTHS[:1] if quick else LENGTHS:
        for d_state in D_STATES:
            yield from _compare_mixers(_config(d_state), length, rounds)
            yield _share_of_ceiling(_config(d_state), length, rounds)


def _config(d_state: int) -> ModelConfig:
    return ModelConfig(
        architecture=Architecture("cross_simba"),  # no prefix: positions are frames
        n_blocks=1,
        d_model=256,
        d_state=d_state,
        text=TextConfig(dim=8),
    )


def _compare_mixers(config: ModelConfig, length: int, rounds: int) -> Iterator[Row]:
    torch.manual_seed(0)
    ours, theirs = Mamba2Mixer(config), reference_mixer(config)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(BATCH, length, config.d_model, requires_grad=True)
    upstream = torch.randn_like(x)
    our_step = partial(_step, lambda: ours(x, Context()), (x, *ours.parameters()), upstream)
    their_step = partial(_step, lambda: theirs(x), (x, *theirs.parameters()), upstream)

    def their_step_with(chunk: int) -> None:
        theirs.chunk_size = chunk
        their_step()

    trial = by_turns(2, *(partial(their_step_with, chunk) for chunk in REFERENCE_CHUNKS))
    theirs.chunk_size = REFERENCE_CHUNKS[int(trial.min(axis=1).argmin())]
    _assert_same_gradients(ours, theirs, our_step(), their_step())

    case = f"d_state {config.d_state}, length {length}"
    what = f"mixer: {case} (theirs in chunks of {theirs.chunk_size})"
    yield times(what, *by_turns(rounds, our_step, their_step))
    our_peak, their_peak = peak_bytes(our_step), peak_bytes(their_step)
    yield Row(
        f"mixer: {case}, peak memory",
        f"{our_peak / 2**20:.0f} MiB",
        f"{their_peak / 2**20:.0f} MiB",
        f"{their_peak / our_peak:.3g}",
    )


def _step(forward: Callable[[], Tensor], inputs: tuple[Tensor, ...], upstream: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(forward(), inputs, upstream)


def _assert_same_gradients(
    ours: nn.Module, theirs: nn.Module, our_gradients: tuple[Tensor, ...], their_gradients: tuple[Tensor, ...]
) -> None:
    """Compare gradients in the order (x, *parameters); each module has its own order of parameters."""
    expected = dict(zip(_names(theirs), their_gradients, strict=True))
    for name, gradient in zip(_names(ours), our_gradients, strict=True):
        size = float(expected[name].abs().max())
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-3 * size)


def _names(module: nn.Module) -> list[str]:
    return ["x", *(name for name, _ in module.named_parameters())]


def _share_of_ceiling(config: ModelConfig, length: int, rounds: int) -> Row:
    """Return the row of the scan alone, forward and backward: its FLOP/s as a share of torch.mm's."""
    convention = FlopConvention(scan_chunk=even_chunk(config.d_state, length))
    forward = forward_flops(config, length, text_positions=0, convention=convention)
    square = torch.randn(SQUARE, SQUARE)
    scan_seconds, product_seconds = by_turns(rounds, _scan(config, length), lambda: torch.mm(square, square))
    scan = forward.layers["scan"] * BATCH * length
    ours = scan * convention.training_factor / float(np.median(scan_seconds))
    ceiling = 2 * SQUARE**3 / float(np.median(product_seconds))
    return Row(
        f"scan alone: d_state {config.d_state}, length {length}, of torch.mm's FLOP/s",
        f"{ours / 1e9:.1f} G",
        f"{ceiling / 1e9:.1f} G",
        f"{ours / ceiling:.0%} of the ceiling",
    )


def _scan(config: ModelConfig, length: int) -> Work:
    heads, groups = config.n_ssm_heads, config.n_groups
    values = torch.randn(BATCH, length, heads, config.ssm_head_dim)
    dt = torch.rand(BATCH, length, heads) * 0.1
    A = -torch.rand(heads) * 15 - 1
    B, C = torch.randn(2, BATCH, length, groups, config.d_state)
    inputs = tuple(t.detach().requires_grad_() for t in (values, dt, A, B, C, torch.ones(heads)))
    return partial(_step, lambda: ssd_scan(*inputs)[0], inputs, torch.randn_like(values))


def peak_bytes(work: Work) -> int:
    """Return the peak bytes of torch's CPU allocator during one call, over those it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(np.cumsum(changes).max())
