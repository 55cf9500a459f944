"""Two linear layers with GELU and dropout between them, applied to each position."""

import math

from torch import Tensor, nn
from torch.nn import functional as F

from ssmttm.model.dropout import Dropout
from ssmttm.model.layers.layer import LayerConfig
from ssmttm.model.layers.sub_layer import Context, Step, SubLayer
from ssmttm.model.packed import PackedLinear


class FeedForward(SubLayer):
    """Two linear layers with GELU and dropout between them."""

    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.d_model, config.ff_mult * config.d_model)
        self.down = nn.Linear(config.ff_mult * config.d_model, config.d_model)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, context: Context) -> Tensor:  # noqa: ARG002
        """Return the transformed positions (batch, length, d_model)."""
        return self.down(self.dropout(F.gelu(self.up(x))))  # type: ignore[no-any-return]

    def begin(self, x: Tensor, context: Context, steps: int) -> tuple[Tensor, Step]:  # noqa: ARG002
        """Return the transformed prefix (batch, positions, d_model), and the step for later positions."""
        up, down = (PackedLinear(layer.weight, layer.bias) for layer in (self.up, self.down))
        return self(x, context), lambda position, _: down(F.gelu(up(position)))

    def initialise(self, n_residual: int) -> None:
        """Scale down the initial output, with biases of zero."""
        self.down.weight.data /= math.sqrt(n_residual)
        nn.init.zeros_(self.up.bias)
        nn.init.zeros_(self.down.bias)
