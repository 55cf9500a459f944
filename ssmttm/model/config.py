"""The configuration of a model: backbone, size, vocabulary and text, validated before anything is built.

Defaults are those of "Training-Efficient Text-to-Music Generation with State-Space Modeling" (arXiv 2601.14786) and
never change, since run ids leave defaults out. Free of torch, because plans of a thousand models must not import it.
"""

from typing import Literal, Self

from pydantic import Field, model_validator

from ssmttm.model.architecture import Architecture
from ssmttm.model.layers.layer import LayerConfig
from ssmttm.text.config import LIMIT, TextConfig


class ModelConfig(LayerConfig):
    """All that decides a model's parameters and arithmetic, and nothing of how it is run."""

    architecture: Architecture
    n_codebooks: int = Field(strict=True, default=1, ge=1, lt=LIMIT)
    codebook_size: int = Field(strict=True, default=1024, ge=2, lt=LIMIT)
    """Codes of a codebook; the vocabulary has one more entry, `special`, for both start and padding."""
    text: TextConfig
    residual: Literal["fp32", "bf16"] = "fp32"
    """Numbers of the residual stream under autocast: bf16 halves its traffic, and rounds every sub-layer's sum."""

    @property
    def vocabulary(self) -> int:
        """Entries of a codebook's embedding: its codes and the special token."""
        return self.codebook_size + 1

    @property
    def special(self) -> int:
        """The id of the start and padding token."""
        return self.codebook_size

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.d_model % 2:
            raise ValueError(f"d_model {self.d_model} is odd: sinusoidal positions need an even d_model")
        for layer in reversed(self.architecture.layers):  # attention's complaint about d_model comes first
            layer.check(self)
        return self
