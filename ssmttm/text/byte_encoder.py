"""Captions as bytes, and the small encoder that is trained with the model."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F

from ssmttm.text.config import BYTE_WIDTH, N_BYTE_IDS, TextConfig
from ssmttm.text.text_batch import TextBatch

PAD, END, BYTE_OFFSET = 0, 1, 3
"""Ids of ByT5 (arXiv 2105.13626): padding, end of text, and byte b at b + 3 (2 is its unused unknown)."""


def collate_bytes(
    captions: Sequence[str], dropped: np.ndarray | Sequence[bool], config: TextConfig
) -> TextBatch:
    """Return captions as ByT5 ids in whole patches, padded on the left to the longest caption of the batch.

    A caption begins at the start of a patch, so that its encoding does not depend on the batch. An empty caption counts
    as dropped.
    """
    rows = [_byte_ids(caption, config) for caption in captions]
    return TextBatch.padded_left(rows, config.patch, captions, dropped)


def _byte_ids(caption: str, config: TextConfig) -> np.ndarray:
    """Return the ids of ByT5Tokenizer in whole patches, without importing it, which takes a second."""
    limit = config.patch * config.max_positions
    raw = np.frombuffer(caption.encode(errors="replace")[: limit - 1], dtype=np.uint8)
    ids = np.full(-(-(len(raw) + 1) // config.patch) * config.patch, PAD, dtype=np.int64)
    ids[: len(raw)] = raw.astype(np.int64) + BYTE_OFFSET
    ids[len(raw)] = END
    return ids


class ByteEncoder(nn.Module):
    """Bytes to text positions: embedding, strided patch convolution, GELU, linear."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.patch = config.patch
        self.embedding = nn.Embedding(N_BYTE_IDS, BYTE_WIDTH, padding_idx=PAD)
        # A kernel of two patches at a stride of one patch: a word across an edge of patches lies whole in one kernel.
        self.convolution = nn.Linear(2 * config.patch * BYTE_WIDTH, config.dim)
        self.out = nn.Linear(config.dim, config.dim)

    def forward(self, ids: Tensor) -> Tensor:
        """Return (batch, positions, dim) for ids (batch, positions * patch) int64."""
        padded = F.pad(ids, (self.patch // 2, self.patch // 2), value=PAD)
        x = self.embedding(padded)  # (batch, bytes + patch, width)
        stride = self.patch * BYTE_WIDTH
        x = x.flatten(1).unfold(1, 2 * stride, stride)  # (batch, positions, 2 * stride)
        return self.out(F.gelu(self.convolution(x)))  # type: ignore[no-any-return]
