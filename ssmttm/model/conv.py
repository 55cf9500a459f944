"""The short causal convolution of Mamba-2 with its SiLU, as shifted multiply-adds.

A depthwise convolution of four taps is four products. torch's convolution needs channels before positions, and the
transposes, here and in the gradient, cost twice the arithmetic: 2.1 ms against 0.9 ms forward and backward for
(8, 264, 160) on one core.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ssmttm.model import kernels


def causal_conv_silu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return SiLU of the depthwise convolution of x (batch, length, channels) with its past.

    weight: (channels, 1, taps), the last tap for the position itself, as in torch's Conv1d. bias: (channels,).
    """
    kernel = kernels.kernels_for(x).convolution
    if kernel is not None and kernels.convolves(weight):
        if x.stride(0) % 8 or x.stride(1) % 8:  # a slice of rows whose width is not a multiple of 8
            # Not x.contiguous(): a single position of a single row is contiguous to torch, whatever its strides.
            x = x.clone(memory_format=torch.contiguous_format)
        return kernel(x.mT, weight[:, 0], bias, activation="silu").mT  # type: ignore[no-any-return]
    if bias is None:
        bias = weight.new_zeros(weight.shape[0])
    return _CausalConvSiLU.apply(x, weight, bias)  # type: ignore[no-any-return, no-untyped-call]


class ConvStep:
    """The same convolution and SiLU, one position after the other.

    It keeps the sums of the next outputs instead of the last inputs: an input adds its share to each of them, the first
    is complete, and all move up by one place.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, batch: int, entered: Tensor | None = None
    ) -> None:
        """Continue from inputs (batch, length, channels), or from none."""
        # (taps, 1, channels), the one for the position itself first.
        self._taps = weight[:, 0].T.flip(0)[:, None].float().contiguous()
        taps, _, channels = self._taps.shape
        # The last place holds the bias, with which every sum begins.
        self._sums = self._taps.new_zeros(taps + 1, batch, channels)
        if bias is not None:
            self._sums.copy_(bias)
        if entered is not None:
            for x in entered[:, 1 - taps :].unbind(1):
                self._add(x)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the next output (batch, channels) float32 for the next input (batch, channels)."""
        return F.silu(self._add(x))

    def _add(self, x: Tensor) -> Tensor:
        sums = torch.addcmul(self._sums[1:], self._taps, x.float())
        self._sums[:-1] = sums
        return sums[0]


class _CausalConvSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        taps = weight[:, 0].T.to(x.dtype).contiguous()  # (taps, channels), the oldest first
        convolved = torch.addcmul(bias.to(x.dtype), x, taps[-1])
        for shift in range(1, min(taps.shape[0], x.shape[1])):
            convolved[:, shift:].addcmul_(x[:, :-shift], taps[-1 - shift])
        ctx.save_for_backward(x, taps, convolved)
        return F.silu(convolved)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        x, taps, convolved = ctx.saved_tensors
        d_convolved = torch.ops.aten.silu_backward(dy, convolved)
        dx = d_convolved * taps[-1]
        d_taps = torch.zeros_like(taps, dtype=torch.float32)
        d_taps[-1] = (d_convolved * x).sum((0, 1))
        for shift in range(1, min(taps.shape[0], x.shape[1])):
            dx[:, :-shift].addcmul_(d_convolved[:, shift:], taps[-1 - shift])
            d_taps[-1 - shift] = (d_convolved[:, shift:] * x[:, :-shift]).sum((0, 1))
        return dx, d_taps.T[:, None], d_convolved.sum((0, 1), dtype=torch.float32)
