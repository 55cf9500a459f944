"""A batch of captions as a model reads it, from either encoder."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class TextBatch:
    """The captions of a batch."""

    values: Tensor
    """(batch, bytes) int64 ids for the byte encoder, or (batch, positions, dim) frozen embeddings."""
    mask: Tensor
    """(batch, positions) bool, True = real; padding is on the left."""
    dropped: Tensor
    """(batch,) bool, True = the caption is dropped: the model replaces it with its null condition."""

    @classmethod
    def padded_left(
        cls,
        rows: Sequence[np.ndarray],
        width: int,
        captions: Sequence[str],
        dropped: np.ndarray | Sequence[bool],
    ) -> "TextBatch":
        """Return the batch of rows (positions x width, ...), padded on the left with zeros to the longest.

        An empty caption counts as dropped.
        """
        lengths = np.array([len(row) for row in rows])
        longest = int(lengths.max())
        values = np.zeros((len(rows), longest, *rows[0].shape[1:]), dtype=rows[0].dtype)
        for row, value in zip(rows, values, strict=True):
            value[longest - len(row) :] = row
        mask = np.arange(longest // width) >= (longest - lengths)[:, None] // width
        empty = np.array([not caption.strip() for caption in captions])
        flags = np.asarray(dropped, dtype=bool) | empty
        return cls(torch.from_numpy(values), torch.from_numpy(mask), torch.from_numpy(flags))

    def to(self, device: torch.device | str) -> "TextBatch":
        """Return the batch on a device."""
        return TextBatch(self.values.to(device), self.mask.to(device), self.dropped.to(device))

    def without(self, positions: Tensor) -> "TextBatch":
        """Return the batch with text positions masked; positions: (batch, positions) bool, True = to be masked.

        A row without real positions counts as dropped.
        """
        mask = self.mask & ~positions
        return replace(self, mask=mask, dropped=self.dropped | ~mask.any(1))

    def unconditional(self) -> "TextBatch":
        """Return the batch with every caption dropped."""
        return replace(self, dropped=torch.ones_like(self.dropped))
