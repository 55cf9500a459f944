"""What a model is: its backbone, its size, its vocabulary and its text, validated before anything is built.

Defaults are those of "Training-Efficient Text-to-Music Generation with State-Space Modeling" (arXiv
2601.14786) and never change, since a run's identity leaves out what is at its default. No torch in here:
planning a study of a thousand models must not import it.
"""

from enum import StrEnum
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ssmttm.text.config import LIMIT, TextConfig


class SubLayer(StrEnum):
    """What a residual sub-layer does."""

    MAMBA2 = "mamba2"
    SELF_ATTENTION = "self_attention"
    CROSS_ATTENTION = "cross_attention"
    FEED_FORWARD = "feed_forward"


class Architecture(StrEnum):
    """The four backbones; prefix models read the text in front of the music, cross models attend to it."""

    PREFIX_MAMBA = "prefix_mamba"
    PREFIX_SIMBA = "prefix_simba"
    CROSS_SIMBA = "cross_simba"
    CROSS_TRANSFORMER = "cross_transformer"

    @property
    def sub_layers(self) -> tuple[SubLayer, ...]:
        """The sub-layers of one block, in order."""
        return {
            Architecture.PREFIX_MAMBA: (SubLayer.MAMBA2,),
            Architecture.PREFIX_SIMBA: (SubLayer.MAMBA2, SubLayer.FEED_FORWARD),
            Architecture.CROSS_SIMBA: (SubLayer.MAMBA2, SubLayer.CROSS_ATTENTION, SubLayer.FEED_FORWARD),
            Architecture.CROSS_TRANSFORMER: (
                SubLayer.SELF_ATTENTION,
                SubLayer.CROSS_ATTENTION,
                SubLayer.FEED_FORWARD,
            ),
        }[self]

    @property
    def has_prefix(self) -> bool:
        """Whether the text stands in front of the music in one sequence."""
        return SubLayer.CROSS_ATTENTION not in self.sub_layers

    @property
    def has_mixer(self) -> bool:
        """Whether blocks mix positions by a state-space scan."""
        return SubLayer.MAMBA2 in self.sub_layers


class ModelConfig(BaseModel):
    """One model: everything that decides its parameters and its arithmetic, not how it is run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: Architecture
    n_blocks: int = Field(strict=True, ge=1, lt=LIMIT)
    d_model: int = Field(strict=True, ge=2, lt=LIMIT)
    d_state: int = Field(strict=True, default=512, ge=1, lt=LIMIT)
    """Width of the state-space memory a channel."""
    d_conv: int = Field(strict=True, default=4, ge=2, lt=LIMIT)
    """Taps of the causal convolution in front of the scan."""
    expand: int = Field(strict=True, default=2, ge=1, lt=LIMIT)
    """The mixer works on expand * d_model channels."""
    ssm_head_dim: int = Field(strict=True, default=64, ge=1, lt=LIMIT)
    """Channels that share one decay in the scan."""
    n_groups: int = Field(strict=True, default=1, ge=1, lt=LIMIT)
    """Groups of scan heads with their own B and C."""
    head_dim: int = Field(strict=True, default=64, ge=1, lt=LIMIT)
    """Channels of an attention head."""
    ff_mult: int = Field(strict=True, default=2, ge=1, lt=LIMIT)
    """The feed-forward layer is ff_mult * d_model wide inside."""
    dropout: float = Field(default=0.3, ge=0.0, lt=1.0)
    """On every sub-layer's output and inside the feed-forward layer."""
    n_codebooks: int = Field(strict=True, default=1, ge=1, lt=LIMIT)
    codebook_size: int = Field(strict=True, default=1024, ge=2, lt=LIMIT)
    """Codes of a codebook; the vocabulary has one more, `special`, which is both start and padding."""
    text: TextConfig

    @property
    def vocabulary(self) -> int:
        """Entries of a codebook's embedding: its codes and the special token."""
        return self.codebook_size + 1

    @property
    def special(self) -> int:
        """The id of the start and padding token."""
        return self.codebook_size

    @property
    def d_inner(self) -> int:
        """Channels the mixer works on."""
        return self.expand * self.d_model

    @property
    def n_ssm_heads(self) -> int:
        """Heads of the scan."""
        return self.d_inner // self.ssm_head_dim

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.d_model % 2:
            raise ValueError(f"d_model {self.d_model} is odd: sinusoidal positions need an even d_model")
        if not self.architecture.has_prefix and self.d_model % self.head_dim:
            raise ValueError(
                f"d_model {self.d_model} does not divide into heads of {self.head_dim}: "
                f"choose a multiple of {self.head_dim}"
            )
        if self.architecture.has_mixer:
            self._check_mixer()
        return self

    def _check_mixer(self) -> None:
        if self.d_inner % self.ssm_head_dim:
            raise ValueError(
                f"expand * d_model {self.d_inner} does not divide into heads of {self.ssm_head_dim}: "
                f"choose a d_model with {self.expand} * d_model a multiple of {self.ssm_head_dim}"
            )
        if self.n_ssm_heads % self.n_groups:
            raise ValueError(
                f"n_groups {self.n_groups} does not divide the {self.n_ssm_heads} heads of the scan "
                f"(expand * d_model / ssm_head_dim): choose a divisor of {self.n_ssm_heads}"
            )
