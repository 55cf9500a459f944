"""Dropout that costs little on a CPU.

On a CPU torch draws a random number for each element, which took a tenth of a training step of a small model; here one
64-bit draw decides four elements. The probability is rounded to 1/65536 and the scale follows the rounded one, so that
the expectation is exact. Other devices use torch's fused kernel.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEVELS = 1 << 16


class Dropout(nn.Module):
    """Zero each element with probability p while training, and scale the rest by 1 / (1 - p)."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Return x of any shape with elements dropped."""
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return F.dropout(x, self.p)
        dropped_levels = round(self.p * LEVELS)
        draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        levels = draws.view(torch.int16)[: x.numel()].view(x.shape)  # uniform over -32768 .. 32767
        keep = levels >= dropped_levels - LEVELS // 2
        return x * keep.to(x.dtype).mul_(LEVELS / (LEVELS - dropped_levels))
