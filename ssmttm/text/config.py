"""The configuration of a model's text, validated before anything is built, and free of torch."""

from typing import Literal, Self

from pydantic import Field, model_validator

from ssmttm.files import Frozen

LIMIT = 2**31
"""Limit of widths and counts: a larger number is a typing error, and sums of such numbers overflow."""
N_BYTE_IDS = 259
"""Ids of the byte encoder: 256 bytes and ByT5's three special ones."""
BYTE_WIDTH = 64
"""Width of a byte's embedding in the byte encoder."""


class TextConfig(Frozen):
    """The encoder of captions, and the size of its output."""

    encoder: Literal["bytes", "frozen"] = "bytes"
    """`bytes`: a small encoder trained with the model; `frozen`: cached embeddings of a pretrained encoder."""
    dim: int = Field(strict=True, ge=1, lt=LIMIT)
    """Width of the encoder's output."""
    patch: int = Field(strict=True, default=8, ge=2, lt=LIMIT)
    """Bytes of one text position (encoder `bytes` only)."""
    max_positions: int = Field(strict=True, default=64, ge=1, lt=LIMIT)
    """Largest number of text positions; longer captions are cut at the end."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.encoder == "bytes" and self.patch % 2:
            raise ValueError(f"patch {self.patch} is odd: choose an even number of bytes, such as 8")
        return self
