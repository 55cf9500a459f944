"""A layer as users write one: the running mean of the sequence, through one matrix.

`register(RunningMean())` registers it; an architecture then names it.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ssmttm.model.layers.layer import How, Layer, LayerConfig, Pass, Saved
from ssmttm.model.layers.sub_layer import Context, Now, Step, SubLayer


class RunningMean(Layer):
    """The facts of the layer."""

    name = "running_mean"
    module = "tests.ssmttm.model.toy_layer:RunningMeanModule"
    is_recurrent = True

    def matrices(self, config: LayerConfig) -> tuple[tuple[int, int], ...]:
        return ((config.d_model, config.d_model),)

    def flops(self, config: LayerConfig, forward: Pass) -> Mapping[str, float]:
        return {"running_mean": forward.n_layers * 2 * config.d_model**2 * forward.a_position}

    def saved(self, config: LayerConfig, length: int, how: How) -> Saved:
        return Saved(kept=how.half * config.d_model, at_once=2 * config.d_model)


class RunningMeanModule(SubLayer):
    """The mean of all real positions so far, projected."""

    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return self.proj(_sums(x, context) / _counts(x, context).clamp(min=1))

    def begin(self, x: Tensor, context: Context, steps: int) -> tuple[Tensor, Step]:
        total = x.new_zeros(x.shape[0], x.shape[2])
        seen = x.new_zeros(x.shape[0], 1)
        if x.shape[1]:
            total, seen = _sums(x, context)[:, -1].clone(), _counts(x, context)[:, -1].clone()

        def step(position: Tensor, now: Now) -> Tensor:
            total.add_(position)
            seen.add_(1)
            return self.proj(total / seen)

        return self(x, context), step

    def initialise(self, n_residual: int) -> None:
        self.proj.weight.data /= math.sqrt(n_residual)


def _sums(x: Tensor, context: Context) -> Tensor:
    return (x if context.mask is None else x * context.mask[..., None]).cumsum(1)


def _counts(x: Tensor, context: Context) -> Tensor:
    mask = torch.ones(x.shape[:2]) if context.mask is None else context.mask
    return mask.to(x.dtype).cumsum(1)[..., None]
