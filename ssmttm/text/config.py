"""How a caption reaches a model: validated before anything is built, and free of torch."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

LIMIT = 2**31
"""No width or count reaches it: beyond, a number is a slip of the pen, and sums of such overflow."""


N_BYTE_IDS = 259
"""Ids of the byte encoder: 256 bytes and ByT5's three special ones."""
BYTE_WIDTH = 64
"""Width of a byte's embedding in the byte encoder."""


class TextConfig(BaseModel):
    """How a caption becomes a sequence of vectors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    encoder: Literal["bytes", "frozen"] = "bytes"
    """`bytes`: a small encoder trained with the model; `frozen`: a pretrained one's cached embeddings."""
    dim: int = Field(strict=True, ge=1, lt=LIMIT)
    """Width of the encoder's output."""
    patch: int = Field(strict=True, default=8, ge=2, lt=LIMIT)
    """Bytes that make one text position (encoder `bytes` only)."""
    max_positions: int = Field(strict=True, default=64, ge=1, lt=LIMIT)
    """Text positions kept at most; what is longer is cut at the end."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.encoder == "bytes" and self.patch % 2:
            raise ValueError(f"patch {self.patch} is odd: choose an even number of bytes, such as 8")
        return self
