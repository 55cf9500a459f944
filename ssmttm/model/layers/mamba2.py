"""The Mamba-2 mixer: a causal convolution, a state-space scan and a gated norm between two projections."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmttm.model import kernels
from ssmttm.model.conv import ConvStep, causal_conv_silu
from ssmttm.model.layers.layer import LayerConfig
from ssmttm.model.layers.sub_layer import Context, Now, Step, SubLayer
from ssmttm.model.packed import PackedLinear
from ssmttm.model.ssd import ScanStep, ssd_scan

NEVER = -1e4
"""A step size before its softplus, which makes it 0 in every floating-point type."""


class Mamba2Mixer(SubLayer):
    """The Mamba-2 mixer (arXiv 2405.21060, section 7), with the parameter names of mamba_ssm."""

    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        self.d_inner, self.heads, self.groups = config.d_inner, config.n_ssm_heads, config.n_groups
        self.d_state = config.d_state
        mixed = self.d_inner + 2 * self.groups * self.d_state
        self.in_proj = nn.Linear(config.d_model, self.d_inner + mixed + self.heads, bias=False)
        self.conv1d = nn.Conv1d(mixed, mixed, config.d_conv, groups=mixed)
        # Step sizes start log-uniform between a thousandth and a tenth, stored as their inverse softplus.
        dt = torch.exp(torch.empty(self.heads).uniform_(math.log(1e-3), math.log(1e-1))).clamp(min=1e-4)
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
        self.A_log = nn.Parameter(torch.empty(self.heads).uniform_(1.0, 16.0).log())
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = GatedRMSNorm(self.d_inner, self.groups)
        self.out_proj = nn.Linear(self.d_inner, config.d_model, bias=False)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Return the mixed sequence (batch, length, d_model), in which masked positions have no effect on others."""
        fused = kernels.kernels_for(x).mixer
        if fused is not None and kernels.convolves(self.conv1d.weight):
            return self._fused(fused, x, context.mask)
        return self.read(x, context)[0]

    def read(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Return the mixed sequence (batch, length, d_model), and what its continuation needs: the convolution's input
        (batch, length, channels) and the scan's final state (batch, heads, d_state, head_dim).
        """
        if context.mask is not None:
            x = x * context.mask[..., None]
        state = self.groups * self.d_state
        widths = [self.d_inner, self.d_inner + 2 * state, self.heads]
        z, xBC, dt = torch.split(self.in_proj(x), widths, dim=-1)
        convolved = causal_conv_silu(xBC, self.conv1d.weight, self.conv1d.bias)
        values, B, C = torch.split(convolved, [self.d_inner, state, state], dim=-1)
        dt = F.softplus(dt + self.dt_bias)
        if context.mask is not None:
            dt = dt * context.mask[..., None]  # a step of size 0 leaves the state unchanged
        y, final = ssd_scan(
            torch.unflatten(values, -1, (self.heads, -1)),
            dt,
            -self.A_log.exp(),
            torch.unflatten(B, -1, (self.groups, -1)),
            torch.unflatten(C, -1, (self.groups, -1)),
            self.D,
        )
        return self.out_proj(self.norm(y.flatten(-2), z)), xBC, final

    def begin(self, x: Tensor, context: Context, steps: int) -> tuple[Tensor, Step]:  # noqa: ARG002
        """Return the mixed prefix (batch, positions, d_model), and the step that continues from it."""
        if x.shape[1] == 0:
            return x, _Step(self, x.shape[0])
        y, entered, state = self.read(x, context)
        return y, _Step(self, x.shape[0], entered, state)

    def initialise(self, n_residual: int) -> None:
        """Scale down the initial output, as mamba_ssm does."""
        self.out_proj.weight.data /= math.sqrt(n_residual)

    def _fused(self, kernel: Callable[..., Any], x: Tensor, mask: Tensor | None) -> Tensor:
        projected = self.in_proj(
            x if mask is None else x * mask[..., None]
        )  # gate, convolution's input, step sizes
        if mask is not None:
            projected[..., -self.heads :].masked_fill_(~mask[..., None], NEVER)
        mixed = kernel(
            *(projected, self.conv1d.weight[:, 0], self.conv1d.bias, self.dt_bias, -self.A_log.exp(), self.D),
            kernels.CHUNK,
            activation="silu",
            rmsnorm_weight=self.norm.weight,
            rmsnorm_eps=self.norm.eps,
            headdim=self.d_inner // self.heads,
            ngroups=self.groups,
            norm_before_gate=False,
        )
        return self.out_proj(mixed)  # type: ignore[no-any-return]


class GatedRMSNorm(nn.Module):
    """RMSNorm of x * silu(gate), for each group of channels separately."""

    def __init__(self, width: int, groups: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.groups, self.eps = groups, eps

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """Return the gated and normalised x (batch, length, width)."""
        kernel = kernels.kernels_for(x).gated_norm
        if kernel is not None:
            width = x.shape[-1] // self.groups
            return kernel(  # type: ignore[no-any-return]
                x, self.weight, None, z=gate, eps=self.eps, group_size=width, norm_before_gate=False
            )
        x = x * F.silu(gate)
        if self.groups == 1:
            return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)
        x = torch.unflatten(x, -1, (self.groups, -1))
        return F.rms_norm(x, x.shape[-1:], None, self.eps).flatten(-2) * self.weight


class _Step:
    """A Mamba-2 mixer as a recurrence."""

    def __init__(
        self, layer: Mamba2Mixer, batch: int, entered: Tensor | None = None, state: Tensor | None = None
    ) -> None:
        self._layer = layer
        self._in_proj = PackedLinear(layer.in_proj.weight)
        self._out_proj = PackedLinear(layer.out_proj.weight)
        state_width = layer.groups * layer.d_state
        self._widths = [layer.d_inner, layer.d_inner + 2 * state_width, layer.heads]
        self._mixed_widths = [layer.d_inner, state_width, state_width]
        self._convolution = ConvStep(layer.conv1d.weight, layer.conv1d.bias, batch, entered)
        if state is None:
            head_dim = layer.d_inner // layer.heads
            state = layer.A_log.new_zeros(batch, layer.heads, layer.d_state, head_dim)
        A, D = -layer.A_log.float().exp(), layer.D.float()
        self._scan = ScanStep(state, layer.dt_bias, A, D, layer.groups)

    def __call__(self, x: Tensor, now: Now) -> Tensor:  # noqa: ARG002
        """Return the output for the next position (batch, d_model), and remember it."""
        layer = self._layer
        z, xBC, dt = torch.split(self._in_proj(x), self._widths, dim=-1)
        values, B, C = torch.split(self._convolution(xBC), self._mixed_widths, dim=-1)
        y = self._scan(
            torch.unflatten(values, -1, (layer.heads, -1)),
            dt,
            torch.unflatten(B, -1, (layer.groups, -1)),
            torch.unflatten(C, -1, (layer.groups, -1)),
        )
        return self._out_proj(layer.norm(y.flatten(1).to(z.dtype), z))
