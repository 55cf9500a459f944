"""mamba-ssm's fused mixer as one operation of torch, which a compiled block calls without looking into it.

torch.compile cannot trace the package's autograd function, which launches Triton kernels by itself. Its forward and
backward are called here with a context that records what they keep, so that nothing of the package is repeated but the
shapes of what it keeps: the scan's output, and the reciprocal sizes of the gated norm.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op, register_autograd

from ssmttm.model import kernels

_TENSORS = (0, 1, 2, 3, 4, 5, 12)
"""Positions of the tensors among the arguments of the package's function."""
_MADE = (3, 10)
"""Positions of what it makes among the tensors that it saves."""


class _Context:
    """The part of autograd's context that the package's function uses; other attributes are settings."""

    saved_tensors: tuple[Tensor | None, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors


_settings: dict[tuple[int, float, int, int], dict[str, Any]] = {}
"""Settings that the forward leaves in its context, by the numbers it was called with."""


def _arrange(given: list[Tensor], made: list[Tensor]) -> tuple[Tensor | None, ...]:
    """Return what the package's function saves in its order (2.3): inputs, what it made, None where it has no use."""
    projected, taps, bias, dt_bias, A, D, norm = given
    scanned, sizes = made
    return projected, taps, bias, scanned, A, D, dt_bias, None, None, norm, sizes, None, None


@custom_op("ssmttm::mixer", mutates_args=())
def mixer(
    projected: Tensor,
    taps: Tensor,
    bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    norm: Tensor,
    chunk: int,
    eps: float,
    head_dim: int,
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mixed sequence (batch, length, d_inner), and what the backward pass needs.

    projected: (batch, length, channels of the projection in). taps: (channels, taps). Raises RuntimeError if the
    installed mamba-ssm keeps other tensors than this file expects.
    """
    context, given = _Context(), [projected, taps, bias, dt_bias, A, D, norm]
    # chunk_size, initial_states, seq_idx, dt_limit, return_final_states, activation; then the gated norm's.
    scan = (chunk, None, None, (0.0, float("inf")), False, "silu")
    mixed = _function().forward(context, *given[:6], *scan, norm, eps, None, None, head_dim, groups, False)
    saved = context.saved_tensors
    made = [one for k, one in enumerate(saved) if k in _MADE and one is not None]
    expected = _arrange(given, made) if len(made) == len(_MADE) else ()
    if list(map(id, saved)) != list(map(id, expected)):
        raise RuntimeError("this mamba-ssm keeps other tensors for its backward pass than ssmttm expects")
    _settings[chunk, eps, head_dim, groups] = vars(context) | {"saved_tensors": ()}
    return mixed, *made


@mixer.register_fake
def _(
    projected: Tensor,
    taps: Tensor,  # noqa: ARG001
    bias: Tensor,  # noqa: ARG001
    dt_bias: Tensor,
    A: Tensor,  # noqa: ARG001
    D: Tensor,  # noqa: ARG001
    norm: Tensor,
    chunk: int,  # noqa: ARG001
    eps: float,  # noqa: ARG001
    head_dim: int,
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length = projected.shape[:2]
    mixed = projected.new_empty(batch, length, norm.shape[0])
    scanned = projected.new_empty(batch, length, dt_bias.shape[0], head_dim)
    return mixed, scanned, projected.new_empty(groups * batch * length, dtype=torch.float32)


@custom_op("ssmttm::mixer_backward", mutates_args=())
def mixer_backward(
    gradient: Tensor,
    given: list[Tensor],
    made: list[Tensor],
    chunk: int,
    eps: float,
    head_dim: int,
    groups: int,
) -> list[Tensor]:
    """Return the gradients of the inputs of `mixer`."""
    context = _Context()
    vars(context).update(_settings[chunk, eps, head_dim, groups])
    context.saved_tensors = _arrange(given, made)
    found = _function().backward(context, gradient)
    return [found[k].to(one.dtype).contiguous() for k, one in zip(_TENSORS, given, strict=True)]


@mixer_backward.register_fake
def _(
    gradient: Tensor,  # noqa: ARG001
    given: list[Tensor],
    made: list[Tensor],  # noqa: ARG001
    chunk: int,  # noqa: ARG001
    eps: float,  # noqa: ARG001
    head_dim: int,  # noqa: ARG001
    groups: int,  # noqa: ARG001
) -> list[Tensor]:
    return [one.new_empty(one.shape) for one in given]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *given, chunk, eps, head_dim, groups = inputs
    ctx.save_for_backward(*given, *output[1:])
    ctx.settings = chunk, eps, head_dim, groups


def _backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    *given, scanned, sizes = ctx.saved_tensors
    gradients = mixer_backward(gradient, given, [scanned, sizes], *ctx.settings)
    return *gradients, None, None, None, None


register_autograd(mixer, _backward, setup_context=_keep)


def _function() -> Any:
    """Return mamba-ssm's autograd function."""
    return kernels.chosen().mixer_function
