"""The projections that self-attention and cross-attention share."""

import math

import torch
from torch import Tensor, nn

from ssmttm.model.layers.layer import LayerConfig
from ssmttm.model.layers.sub_layer import SubLayer


class Attention(SubLayer):
    """Multi-head attention."""

    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.k_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.v_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.out_proj = nn.Linear(config.d_model, config.d_model, bias=False)

    def heads(self, x: Tensor) -> Tensor:
        """Return x (batch, length, d_model) as (batch, heads, length, head_dim)."""
        return torch.unflatten(x, -1, (-1, self.head_dim)).transpose(1, 2)

    def initialise(self, n_residual: int) -> None:
        """Start the branch small."""
        self.out_proj.weight.data /= math.sqrt(n_residual)
