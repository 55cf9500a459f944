"""The projections of self-attention and cross-attention."""

import math

import torch
from torch import Tensor, nn

from ssmttm.model.layers.layer import LayerConfig
from ssmttm.model.layers.sub_layer import SubLayer

ALIGNMENT = 8
"""Elements that torch's attention on CUDA wants the rows of a mask to begin at multiples of; it copies others."""


class Attention(SubLayer):
    """Multi-head attention."""

    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(config.d_model, config.d_model, bias=False) for _ in range(4)
        )

    def heads(self, x: Tensor) -> Tensor:
        """Return x (batch, length, d_model) as (batch, heads, length, head_dim)."""
        return torch.unflatten(x, -1, (-1, self.head_dim)).transpose(1, 2)

    def initialise(self, n_residual: int) -> None:
        """Scale down the initial output."""
        self.out_proj.weight.data /= math.sqrt(n_residual)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask (..., positions), True = may be attended to, as terms of the scores: 0 or -inf.

    Attention takes both; given True and False it makes these terms at every call.
    """
    positions = mask.shape[-1]
    width = math.ceil(positions / ALIGNMENT) * ALIGNMENT
    terms = torch.full((*mask.shape[:-1], width), -math.inf, dtype=dtype, device=mask.device)[..., :positions]
    return terms.masked_fill_(mask, 0)
