"""Parameters and floating-point operations of a model from its configuration, with every convention named.

Conventions move the exponents of scaling laws by tenths ("Resolving Discrepancies in Compute-Optimal Scaling", arXiv
2406.19146), so none is implied: a multiply-add is two operations; embedding lookups, norms, activations and
element-wise products are not counted; every other choice is a field of `FlopConvention`. Plain arithmetic without
torch, since a plan counts thousands of models; tests compare it with built models.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ssmttm.model.config import ModelConfig
from ssmttm.model.layers.layer import FlopConvention, Pass
from ssmttm.text.config import BYTE_WIDTH, N_BYTE_IDS


@dataclass(frozen=True)
class ParameterCount:
    """Trainable parameters by purpose."""

    backbone: int
    embedding: int
    """Tables of the music tokens."""
    head: int
    text_projection: int
    text_encoder: int
    """The encoder trained with the model; a frozen one counts 0."""
    null_condition: int

    @property
    def n_params(self) -> int:
        """Backbone, embeddings, heads and text projection: N in the tables of this project."""
        return self.backbone + self.embedding + self.head + self.text_projection

    @property
    def non_embedding(self) -> int:
        """n_params without embeddings and heads (arXiv 2001.08361, section 1.3)."""
        return self.n_params - self.embedding - self.head


DEFAULT_CONVENTION = FlopConvention()


class FlopCount(NamedTuple):
    """Operations of one forward pass for a position (a frame of music), by purpose."""

    layers: Mapping[str, float]
    """By purpose, such as `mixer` and `scan`."""
    head: float
    text_projection: float
    text_encoder: float
    """The byte encoder; counted separately, as are its parameters."""

    @property
    def forward(self) -> float:
        """All operations but the text encoder's."""
        # Added and subtracted again: the last digit of every recorded count depends on it.
        total = sum(self.layers.values()) + self.head + self.text_projection + self.text_encoder
        return total - self.text_encoder


def parameter_count(config: ModelConfig) -> ParameterCount:
    """Return the parameters of a model, exactly those of the built one."""
    d, text = config.d_model, config.text
    table = config.n_codebooks * config.vocabulary * d
    block = sum(d + layer.parameters(config) for layer in config.architecture.layers)
    convolution = 2 * text.patch * BYTE_WIDTH * text.dim + text.dim
    encoder = N_BYTE_IDS * BYTE_WIDTH + convolution + text.dim * text.dim + text.dim
    return ParameterCount(
        backbone=config.n_blocks * block,
        embedding=table,
        head=table,
        text_projection=text.dim * d + d + 2 * d,
        text_encoder=encoder if text.encoder == "bytes" else 0,
        null_condition=text.dim,
    )


def forward_flops(
    config: ModelConfig,
    frames: int,
    text_positions: int,
    convention: FlopConvention = DEFAULT_CONVENTION,
) -> FlopCount:
    """Return the operations of a forward pass per frame, for clips of `frames` with captions of `text_positions`.

    The frames bear the delay pattern's extra steps and a prefix's positions.
    """
    steps = frames + config.n_codebooks - 1
    prefix = text_positions if config.architecture.has_prefix and convention.prefix else 0
    length = prefix + steps
    d, a_text = config.d_model, text_positions / frames
    layers = config.architecture.layers
    spent: dict[str, float] = {}
    for layer in dict.fromkeys(layers):
        count = float(config.n_blocks * layers.count(layer))
        forward = Pass(count, frames, length, text_positions, convention)
        for part, operations in layer.flops(config, forward).items():
            spent[part] = spent.get(part, 0.0) + operations
    patch = 2 * (2 * config.text.patch * BYTE_WIDTH * config.text.dim + config.text.dim**2)
    return FlopCount(
        layers=spent,
        head=2 * d * config.vocabulary * config.n_codebooks * steps / frames,
        text_projection=2 * config.text.dim * d * a_text,
        text_encoder=patch * a_text if config.text.encoder == "bytes" else 0.0,
    )


def training_flops(
    config: ModelConfig,
    frames: int,
    text_positions: int,
    convention: FlopConvention = DEFAULT_CONVENTION,
) -> float:
    """Return the operations of training per frame: three forward passes, without the text encoder."""
    return convention.training_factor * forward_flops(config, frames, text_positions, convention).forward
