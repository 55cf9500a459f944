"""The module of a sub-layer: f of x + Drop(f(RMSNorm(x))), over a sequence or one position at a time."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Now:
    """The index of a step, as tensors of the device, so that a recorded step can be repeated."""

    index: Tensor
    """(1,) int64: the number of steps before this one."""
    mask: Tensor
    """(1, 1, 1, reach): 0 for steps up to this one, -inf for later ones; reach: the steps whose memory is read."""


Step = Callable[[Tensor, Now], Tensor]
"""Takes the next position (batch, d_model) through one sub-layer, which remembers it.

It may be recorded once and repeated by the device alone: it keeps its memory in tensors that it changes in place, reads
no value of a tensor, and decides nothing by a number that changes from step to step.
"""


@dataclass(frozen=True)
class Context:
    """Masks and text beside the sequence."""

    mask: Tensor | None = None
    """(batch, length) bool, True = real; None if all positions are."""
    memory: Tensor | None = None
    """(batch, positions, d_model): the projected text of a cross model."""
    memory_mask: Tensor | None = None
    """(batch, 1, 1, positions) bool, True = may be attended to."""


class SubLayer(nn.Module, ABC):
    """A sub-layer, built from a `LayerConfig`."""

    @abstractmethod
    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Return the transformed sequence (batch, length, d_model)."""

    @abstractmethod
    def begin(self, x: Tensor, context: Context, steps: int) -> tuple[Tensor, Step]:
        """Return `forward` of the prefix (batch, positions, d_model), and the step that continues from its end, for at
        most `steps` positions. The prefix of a cross model has no positions.
        """

    @abstractmethod
    def initialise(self, n_residual: int) -> None:
        """Scale down the initial output for a model with so many sub-layers."""
