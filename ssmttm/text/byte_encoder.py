"""Captions as bytes and the small encoder that is trained with the model: text without a pretrained part."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmttm.text.config import BYTE_WIDTH, N_BYTE_IDS, TextConfig
from ssmttm.text.text_batch import TextBatch

PAD, END, BYTE_OFFSET = 0, 1, 3
"""The ids of ByT5 (arXiv 2105.13626): padding, end of text, and byte b at b + 3 (2 is its unused unknown)."""


def collate_bytes(
    captions: Sequence[str], dropped: np.ndarray | Sequence[bool], config: TextConfig
) -> TextBatch:
    """Return captions as ByT5 ids in whole patches, padded on the left to the longest caption of the batch.

    A caption is laid out from the start of its first patch, so that what it becomes does not depend on the
    batch. An empty caption says nothing and counts as dropped.
    """
    rows = [_byte_ids(caption, config.patch * config.max_positions) for caption in captions]
    patches = np.array([-(-len(row) // config.patch) for row in rows])
    positions = int(patches.max())
    values = np.full((len(rows), positions * config.patch), PAD, dtype=np.int64)
    for i, row in enumerate(rows):
        start = (positions - patches[i]) * config.patch
        values[i, start : start + len(row)] = row
    mask = np.arange(positions) >= (positions - patches)[:, None]
    silent = np.array([not caption.strip() for caption in captions])
    return TextBatch(
        torch.from_numpy(values),
        torch.from_numpy(mask),
        torch.from_numpy(np.asarray(dropped, dtype=bool) | silent),
    )


def _byte_ids(caption: str, limit: int) -> np.ndarray:
    """The ids ByT5Tokenizer gives, without the second its import costs."""
    raw = np.frombuffer(caption.encode(errors="replace")[: limit - 1], dtype=np.uint8).astype(np.int64)
    return np.append(raw + BYTE_OFFSET, END)


class ByteEncoder(nn.Module):
    """Bytes to text positions: embedding, strided patch convolution, GELU, linear."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.patch = config.patch
        self.embedding = nn.Embedding(N_BYTE_IDS, BYTE_WIDTH, padding_idx=PAD)
        # A kernel of two patches at a stride of one: a word cut by a patch's edge is still seen whole.
        self.convolution = nn.Linear(2 * config.patch * BYTE_WIDTH, config.dim)
        self.out = nn.Linear(config.dim, config.dim)

    def forward(self, ids: Tensor) -> Tensor:
        """Return (batch, positions, dim) for ids (batch, positions * patch) int64."""
        x = self.embedding(
            F.pad(ids, (self.patch // 2, self.patch // 2), value=PAD)
        )  # (batch, bytes + patch, width)
        x = x.flatten(1).unfold(
            1, 2 * self.patch * BYTE_WIDTH, self.patch * BYTE_WIDTH
        )  # (batch, positions, ..)
        return self.out(F.gelu(self.convolution(x)))  # type: ignore[no-any-return]
