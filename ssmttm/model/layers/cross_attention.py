"""Attention from the sequence to the text."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ssmttm.model.layers.attention import Attention, additive
from ssmttm.model.layers.sub_layer import Context, Now, Step
from ssmttm.model.packed import PackedLinear


class CrossAttention(Attention):
    """Multi-head attention from the sequence to the text."""

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Return the output (batch, length, d_model) of attention to the text."""
        assert context.memory is not None
        q = self.heads(self.q_proj(x))
        k, v = (self.heads(p(context.memory)) for p in (self.k_proj, self.v_proj))
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=context.memory_mask)
        return self.out_proj(read.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def begin(self, x: Tensor, context: Context, steps: int) -> tuple[Tensor, Step]:  # noqa: ARG002
        """Return the empty prefix, and a step that holds the keys and values of the text."""
        assert context.memory is not None
        assert context.memory_mask is not None
        q_proj, out_proj = PackedLinear(self.q_proj.weight), PackedLinear(self.out_proj.weight)
        keys, values = (self.heads(p(context.memory)).contiguous() for p in (self.k_proj, self.v_proj))
        mask = additive(context.memory_mask, keys.dtype)

        def step(position: Tensor, now: Now) -> Tensor:  # noqa: ARG001
            q = torch.unflatten(q_proj(position), -1, (-1, 1, self.head_dim))
            read = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
            return out_proj(read.flatten(1))

        return x, step
