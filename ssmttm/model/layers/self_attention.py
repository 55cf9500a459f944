"""Causal attention over the sequence."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ssmttm.model.layers.attention import Attention
from ssmttm.model.layers.sub_layer import Context, Step
from ssmttm.model.packed import PackedLinear


class SelfAttention(Attention):
    """Causal multi-head attention over the sequence."""

    def forward(self, x: Tensor, context: Context) -> Tensor:  # noqa: ARG002
        """Return what each position (batch, length, d_model) reads up to and including itself."""
        q, k, v = (self.heads(p(x)) for p in (self.q_proj, self.k_proj, self.v_proj))
        read = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(read.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def begin(self, x: Tensor, context: Context, steps: int) -> tuple[Tensor, Step]:  # noqa: ARG002
        """Return the empty prefix, and room for the keys and values of so many steps."""
        if x.shape[1]:
            raise NotImplementedError("self-attention behind a prefix: no architecture has it")
        return x, _Step(self, x.shape[0], steps)


class _Step:
    """Self-attention that keeps keys and values, in room that is taken once."""

    def __init__(self, layer: SelfAttention, batch: int, steps: int) -> None:
        self._head_dim = layer.head_dim
        width = layer.q_proj.weight.shape[0]
        room = (batch, width // layer.head_dim, steps, layer.head_dim)
        self._keys, self._values = (layer.k_proj.weight.new_zeros(room) for _ in range(2))
        self._in_proj = PackedLinear(
            torch.cat([layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight])
        )
        self._out_proj = PackedLinear(layer.out_proj.weight)
        self._seen = 0

    def __call__(self, x: Tensor) -> Tensor:
        """Return what the next position (batch, d_model) reads, and remember it."""
        q, k, v = torch.unflatten(self._in_proj(x), -1, (3, -1, self._head_dim)).unbind(1)
        self._keys[:, :, self._seen], self._values[:, :, self._seen] = k, v
        self._seen += 1
        keys, values = self._keys[:, :, : self._seen], self._values[:, :, : self._seen]
        read = F.scaled_dot_product_attention(q[:, :, None], keys, values)
        return self._out_proj(read.flatten(1))
