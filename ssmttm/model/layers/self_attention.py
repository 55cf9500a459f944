"""Causal attention over the sequence."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ssmttm.model.layers.attention import Attention
from ssmttm.model.layers.sub_layer import Context, Now, Step
from ssmttm.model.packed import PackedLinear


class SelfAttention(Attention):
    """Causal multi-head attention over the sequence."""

    def forward(self, x: Tensor, context: Context) -> Tensor:  # noqa: ARG002
        """Return the output (batch, length, d_model); a position attends to itself and those before it."""
        q, k, v = (self.heads(p(x)) for p in (self.q_proj, self.k_proj, self.v_proj))
        read = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(read.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def begin(self, x: Tensor, context: Context, steps: int) -> tuple[Tensor, Step]:  # noqa: ARG002
        """Return the empty prefix, and a step with memory for the keys and values of `steps` positions."""
        if x.shape[1]:
            raise NotImplementedError("self-attention behind a prefix: no architecture has it")
        in_proj = PackedLinear(torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight]))
        out_proj = PackedLinear(self.out_proj.weight)
        # (batch, keys and values, heads, steps, head_dim)
        shape = (x.shape[0], 2, x.shape[2] // self.head_dim, steps, self.head_dim)
        memory = self.k_proj.weight.new_zeros(shape)

        def step(position: Tensor, now: Now) -> Tensor:
            projected = torch.unflatten(in_proj(position), -1, (3, -1, 1, self.head_dim))
            memory.index_copy_(3, now.index, projected[:, 1:])
            keys, values = memory[..., : now.mask.shape[-1], :].unbind(1)
            read = F.scaled_dot_product_attention(projected[:, 0], keys, values, attn_mask=now.mask)
            return out_proj(read.flatten(1))

        return x, step
