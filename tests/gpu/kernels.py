"""The kernels of a mixer in bf16 against PyTorch in float32, in outputs and in every gradient."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ssmttm.model.kernels import TORCH, Kernels, chosen
from ssmttm.model.layers.mamba2 import Mamba2Mixer
from ssmttm.model.layers.sub_layer import Context
from tests.benchmarks.measure import clocked
from tests.gpu.report import note, verdict
from tests.gpu.sizes import DEVICE, Size
from tests.ssmttm.kernel_devices import using

PARTS = {"fused": {}, "parts": {"mixer": None}, "scan alone": {"mixer": None, "convolution": None}}
MOST = 0.03
"""Largest relative error in bf16."""


class Compared(NamedTuple):
    """One way to compute a mixer."""

    agrees: bool
    text: str


class Mixer:
    """A mixer of a size with its input, of which a row begins with masked positions."""

    def __init__(self, size: Size) -> None:
        torch.manual_seed(0)
        shape = 2, size.frames + size.text, size.d_model
        self.layer = Mamba2Mixer(size.config("prefix_simba")).to(DEVICE)
        self.x = torch.randn(shape, device=DEVICE, requires_grad=True)
        self.mask = torch.ones(shape[:2], dtype=torch.bool, device=DEVICE)
        self.mask[0, : size.text // 3] = False
        self.upstream = torch.randn(shape, device=DEVICE)

    def run(self, kernels: Kernels, *, half: bool) -> dict[str, Tensor]:
        """Return the output and all gradients by name."""
        with using(kernels), torch.autocast(DEVICE, torch.bfloat16, enabled=half):
            y = self.layer(self.x, Context(mask=self.mask))
        y = y * self.mask[..., None]  # outputs at masked positions are undefined
        named = {"x": self.x, **dict(self.layer.named_parameters())}
        gradients = torch.autograd.grad(y, tuple(named.values()), self.upstream.to(y.dtype))
        return {"output": y.detach(), **dict(zip(named, gradients, strict=True))}


def compared(size: Size, kernels: Kernels) -> Iterator[Compared]:
    """Compare each way to use the kernels.

    It agrees if its output does, and no gradient is three times as far from float32's as the worst of PyTorch in bf16.
    """
    mixer = Mixer(size)
    exact = mixer.run(TORCH, half=False)

    def errors(which: Kernels) -> dict[str, float]:
        found = mixer.run(which, half=True)
        return {
            name: float((found[name].float() - t).norm() / t.norm().clamp(min=1e-20))
            for name, t in exact.items()
        }

    of_torch = errors(TORCH)
    in_torch = of_torch.pop("output")
    bar = max(MOST, 3 * max(of_torch.values()))
    for name, without in PARTS.items():
        which = replace(kernels, **without)
        first, again = (clocked(partial(errors, which)) for _ in range(2))
        off = errors(which)
        output, worst = off.pop("output"), max(off, key=lambda each: off[each])
        yield Compared(
            output < MOST and off[worst] < bar,
            f"{name}: output off by {output:.1e} (PyTorch {in_torch:.1e}), gradient of {worst} by {off[worst]:.1e} "
            f"(bar {bar:.1e}); first call {first:.1f} s, then {again * 1e3:.1f} ms",
        )


def kernels(size: Size) -> None:
    """Compare all ways with PyTorch, and two equal calls with each other."""
    for agrees, text in compared(size, chosen()):
        verdict(agrees, text)
    mixer = Mixer(size)
    first, second = (mixer.run(chosen(), half=True) for _ in range(2))
    differing = [name for name in first if not torch.equal(first[name], second[name])]
    note(f"the same input twice: {'differs in ' + ', '.join(differing) if differing else 'equal to the bit'}")
