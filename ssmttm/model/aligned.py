"""Products with a matrix of any number of rows at a GPU's full speed.

cuBLAS and CUTLASS move 16 bytes at once only where all rows of a matrix start at multiples of 16 bytes: 8 numbers of
bfloat16, 4 of TF32. Of the logits of a vocabulary of 1,025 hardly any row does, and their products fall back to slower
kernels. Such a matrix is padded on the way, which costs about the copy that autocast makes anyway. Rows that are a
multiple of 8 gain nothing by more: a mixer's 5,152 columns fill as many tiles of 128 as 5,184 would.
"""

from torch import Tensor, nn
from torch.nn import functional as F

STEP = 8
"""Numbers that a GPU's rows must be a multiple of."""
WIDTH = 64
"""Multiple to which others are padded: whole instructions of the tensor cores."""


class AlignedLinear(nn.Linear):
    """nn.Linear without a bias whose outputs have aligned rows on a GPU; its weight is the same."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return x (..., inputs) times the weight, (..., outputs): a view of a wider tensor where that is padded."""
        if x.device.type == "cpu" or self.out_features % STEP == 0:
            return F.linear(x, self.weight)
        padded = F.pad(self.weight, (0, 0, 0, -self.out_features % WIDTH))
        return F.linear(x, padded)[..., : self.out_features]
