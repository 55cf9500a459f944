"""The sub-layers all four backbones are made of: x + Drop(f(RMSNorm(x))) with f a mixer, attention or
feed-forward.

Every f takes the sequence (batch, length, d_model) and a `Context`, reads of it what it needs, and returns
the shape it was given.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmttm.model import kernels
from ssmttm.model.config import ModelConfig, SubLayer
from ssmttm.model.conv import causal_conv_silu
from ssmttm.model.dropout import Dropout
from ssmttm.model.ssd import ssd_scan


@dataclass(frozen=True)
class Context:
    """What a sub-layer may need beside the sequence."""

    mask: Tensor | None = None
    """(batch, length) bool, True = real; None when every position is."""
    memory: Tensor | None = None
    """(batch, positions, d_model): the projected text of a cross model."""
    memory_mask: Tensor | None = None
    """(batch, 1, 1, positions) bool, True = may be attended to."""


class RMSNorm(nn.Module):
    """Scale each vector to unit root mean square, then by a learned weight."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return x (..., width) normalised."""
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Mamba2Mixer(nn.Module):
    """The Mamba-2 mixer (arXiv 2405.21060, section 7), with the parameter names of mamba_ssm."""

    def __init__(self, config: ModelConfig) -> None:
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
        """Return the mixed sequence (batch, length, d_model); what is masked leaves no trace on the rest."""
        if kernels.fuses(x, self.conv1d.weight):
            return self._fused(x, context)
        return self.read(x, context)[0]

    def read(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Return the mixed sequence and what going on after it needs: what entered the convolution, (batch,
        length, channels), and the scan's final state (batch, heads, d_state, head_dim).
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
            dt = dt * context.mask[..., None]  # a step of size 0 lets the state pass
        y, final = ssd_scan(
            torch.unflatten(values, -1, (self.heads, -1)),
            dt,
            -self.A_log.exp(),
            torch.unflatten(B, -1, (self.groups, -1)),
            torch.unflatten(C, -1, (self.groups, -1)),
            self.D,
        )
        return self.out_proj(self.norm(y.flatten(-2), z)), xBC, final

    def _fused(self, x: Tensor, context: Context) -> Tensor:
        if context.mask is not None:
            x = x * context.mask[..., None]
        mixed = kernels.fused_mixer(
            self.in_proj(x),
            context.mask,
            conv_weight=self.conv1d.weight,
            conv_bias=self.conv1d.bias,
            dt_bias=self.dt_bias,
            A=-self.A_log.exp(),
            D=self.D,
            norm_weight=self.norm.weight,
            norm_eps=self.norm.eps,
            groups=self.groups,
        )
        return self.out_proj(mixed)  # type: ignore[no-any-return]


class GatedRMSNorm(nn.Module):
    """RMSNorm of x * silu(gate), each group of channels by itself."""

    def __init__(self, width: int, groups: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.groups, self.eps = groups, eps

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """Return the gated and normalised x (batch, length, width)."""
        by_kernel = kernels.gated_norm(x, gate, self.weight, self.eps, self.groups)
        if by_kernel is not None:
            return by_kernel
        x = x * F.silu(gate)
        if self.groups == 1:
            return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)
        x = torch.unflatten(x, -1, (self.groups, -1))
        return F.rms_norm(x, x.shape[-1:], None, self.eps).flatten(-2) * self.weight


class SelfAttention(nn.Module):
    """Causal multi-head attention over the sequence."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.k_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.v_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.out_proj = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, x: Tensor, context: Context) -> Tensor:  # noqa: ARG002
        """Return what each position (batch, length, d_model) reads up to and including itself."""
        q, k, v = (_heads(p(x), self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        read = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(read.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class CrossAttention(nn.Module):
    """Multi-head attention from the sequence to the text."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.k_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.v_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.out_proj = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Return what each position (batch, length, d_model) reads from the text."""
        assert context.memory is not None
        q = _heads(self.q_proj(x), self.head_dim)
        k, v = (_heads(p(context.memory), self.head_dim) for p in (self.k_proj, self.v_proj))
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=context.memory_mask)
        return self.out_proj(read.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def _heads(x: Tensor, head_dim: int) -> Tensor:
    return torch.unflatten(x, -1, (-1, head_dim)).transpose(1, 2)  # (batch, heads, length, head_dim)


class FeedForward(nn.Module):
    """Two linear layers with GELU and dropout between them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.d_model, config.ff_mult * config.d_model)
        self.down = nn.Linear(config.ff_mult * config.d_model, config.d_model)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, context: Context) -> Tensor:  # noqa: ARG002
        """Return each position (batch, length, d_model) transformed by itself."""
        return self.down(self.dropout(F.gelu(self.up(x))))  # type: ignore[no-any-return]


Layer = Mamba2Mixer | SelfAttention | CrossAttention | FeedForward

LAYERS: dict[SubLayer, type[Layer]] = {
    SubLayer.MAMBA2: Mamba2Mixer,
    SubLayer.SELF_ATTENTION: SelfAttention,
    SubLayer.CROSS_ATTENTION: CrossAttention,
    SubLayer.FEED_FORWARD: FeedForward,
}


class Residual(nn.Module):
    """x + Drop(f(RMSNorm(x)))."""

    def __init__(self, layer: Layer, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model)
        self.layer = layer
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Return the sequence (batch, length, d_model) with the sub-layer's output added."""
        return x + self.dropout(self.layer(self.norm(x), context))  # type: ignore[no-any-return]


class Block(nn.Module):
    """One block: the residual sub-layers of an architecture in order."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.sub_layers = nn.ModuleList(
            Residual(LAYERS[kind](config), config) for kind in config.architecture.sub_layers
        )

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Return the sequence (batch, length, d_model) after all sub-layers."""
        for sub_layer in self.sub_layers:
            x = sub_layer(x, context)
        return x
