"""What a batch of captions is to a model, whichever encoder it comes from."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class TextBatch:
    """The captions of a batch as the model takes them."""

    values: Tensor
    """(batch, bytes) int64 ids for the byte encoder, or (batch, positions, dim) frozen embeddings."""
    mask: Tensor
    """(batch, positions) bool, True = real; padding is on the left."""
    dropped: Tensor
    """(batch,) bool, True = the caption is dropped: the model puts its null condition in its place."""

    def to(self, device: torch.device | str) -> "TextBatch":
        """Return the batch on a device."""
        return TextBatch(self.values.to(device), self.mask.to(device), self.dropped.to(device))

    def without(self, positions: Tensor) -> "TextBatch":
        """Return the batch with text positions masked; positions: (batch, positions) bool, True = to be
        masked.

        A row that is left with no position counts as dropped.
        """
        mask = self.mask & ~positions
        return replace(self, mask=mask, dropped=self.dropped | ~mask.any(1))

    def unconditional(self) -> "TextBatch":
        """Return the batch with every caption dropped."""
        return replace(self, dropped=torch.ones_like(self.dropped))
