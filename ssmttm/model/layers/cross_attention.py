"""Attention from the sequence to the text."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ssmttm.model.layers.attention import Attention
from ssmttm.model.layers.sub_layer import Context, Step
from ssmttm.model.packed import PackedLinear


class CrossAttention(Attention):
    """Multi-head attention from the sequence to the text."""

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Return what each position (batch, length, d_model) reads from the text."""
        assert context.memory is not None
        q = self.heads(self.q_proj(x))
        k, v = (self.heads(p(context.memory)) for p in (self.k_proj, self.v_proj))
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=context.memory_mask)
        return self.out_proj(read.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def begin(self, x: Tensor, context: Context, steps: int) -> tuple[Tensor, Step]:  # noqa: ARG002
        """Return the empty prefix, and the keys and values of the text."""
        return x, _Step(self, context)


class _Step:
    """Attention to the text, whose keys and values are made once."""

    def __init__(self, layer: CrossAttention, context: Context) -> None:
        assert context.memory is not None
        self._head_dim, self._mask = layer.head_dim, context.memory_mask
        self._q_proj, self._out_proj = PackedLinear(layer.q_proj.weight), PackedLinear(layer.out_proj.weight)
        self._keys, self._values = (
            layer.heads(project(context.memory)).contiguous() for project in (layer.k_proj, layer.v_proj)
        )

    def __call__(self, x: Tensor) -> Tensor:
        """Return what the next position (batch, d_model) reads."""
        q = torch.unflatten(self._q_proj(x), -1, (-1, 1, self._head_dim))
        read = F.scaled_dot_product_attention(q, self._keys, self._values, attn_mask=self._mask)
        return self._out_proj(read.flatten(1))
