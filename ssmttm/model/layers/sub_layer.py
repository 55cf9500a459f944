"""The module of a sub-layer: f of x + Drop(f(RMSNorm(x))), over a sequence at once or one position at a time."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

Step = Callable[[Tensor], Tensor]
"""The next position (batch, d_model) through one sub-layer, which remembers it."""


@dataclass(frozen=True)
class Context:
    """What a sub-layer may need beside the sequence."""

    mask: Tensor | None = None
    """(batch, length) bool, True = real; None when every position is."""
    memory: Tensor | None = None
    """(batch, positions, d_model): the projected text of a cross model."""
    memory_mask: Tensor | None = None
    """(batch, 1, 1, positions) bool, True = may be attended to."""


class SubLayer(nn.Module, ABC):
    """A sub-layer, built from a `LayerConfig`."""

    @abstractmethod
    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Return the sequence (batch, length, d_model) transformed."""

    @abstractmethod
    def begin(self, x: Tensor, context: Context, steps: int) -> tuple[Tensor, Step]:
        """Return what `forward` does of the prefix (batch, positions, d_model), and the way on from its end, for at
        most so many steps. A prefix of no positions is that of a cross model.
        """

    @abstractmethod
    def initialise(self, n_residual: int) -> None:
        """Start small what is added to the stream of a model with so many sub-layers."""
