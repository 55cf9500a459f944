"""The blocks of all backbones: sub-layers x + Drop(f(RMSNorm(x))), with f a layer of the table."""

from pkgutil import resolve_name

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmttm.model.config import ModelConfig
from ssmttm.model.dropout import Dropout
from ssmttm.model.layers.sub_layer import Context, SubLayer


class RMSNorm(nn.Module):
    """Scale each vector to unit root mean square, then by a learned weight."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return x (..., width) normalised."""
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Residual(nn.Module):
    """x + Drop(f(RMSNorm(x)))."""

    def __init__(self, layer: SubLayer, config: ModelConfig) -> None:
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
            Residual(resolve_name(layer.module)(config), config) for layer in config.architecture.layers
        )

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Return the sequence (batch, length, d_model) after all sub-layers."""
        for sub_layer in self.sub_layers:
            x = sub_layer(x, context)
        return x
