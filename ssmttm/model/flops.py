"""Parameters and floating-point operations of a model from its configuration, with every convention named.

Conventions move the exponents of scaling laws by tenths ("Resolving Discrepancies in Compute-Optimal
Scaling", arXiv 2406.19146), so none is implied: a multiply-add is two operations; embedding lookups,
norms, activations and element-wise products are not counted; what remains open is a field of
`FlopConvention`. Plain arithmetic without torch, since planning counts thousands of models; the tests hold
it against built models.
"""

from dataclasses import dataclass, fields
from typing import Literal

from ssmttm.model.config import ModelConfig, SubLayer
from ssmttm.text.config import BYTE_WIDTH, N_BYTE_IDS


@dataclass(frozen=True)
class ParameterCount:
    """Trainable parameters by what they are for."""

    backbone: int
    embedding: int
    """Embedding tables of the music tokens."""
    head: int
    text_projection: int
    text_encoder: int
    """The encoder trained with the model; a frozen one is not part of it and counts 0."""
    null_condition: int

    @property
    def n_params(self) -> int:
        """Backbone, embeddings, heads and text projection: the N of this project's tables."""
        return self.backbone + self.embedding + self.head + self.text_projection

    @property
    def non_embedding(self) -> int:
        """n_params without embeddings and heads (arXiv 2001.08361, section 1.3)."""
        return self.n_params - self.embedding - self.head


@dataclass(frozen=True)
class FlopConvention:
    """What is open in a count of operations."""

    attention: Literal["causal", "full"] = "causal"
    """Whether self-attention is charged for what a position may see, half on average, or for all."""
    scan_chunk: int = 256
    """Chunk of the state-space scan (mamba_ssm's default); a larger one costs more inside chunks."""
    prefix: bool = True
    """Whether the positions of a prefix are charged, to the frames; those of a cross model's text always are."""
    training_factor: float = 3.0
    """Operations of a training step over those of its forward pass (backward costs two of them)."""


DEFAULT_CONVENTION = FlopConvention()


@dataclass(frozen=True)
class FlopCount:
    """Operations of one forward pass, a position (a frame of music), by where they are spent."""

    mixer: float = 0.0
    """Projections and convolution of the Mamba-2 mixers."""
    scan: float = 0.0
    attention: float = 0.0
    cross_attention: float = 0.0
    feed_forward: float = 0.0
    head: float = 0.0
    text_projection: float = 0.0
    text_encoder: float = 0.0
    """The byte encoder; counted apart, as its parameters are."""

    @property
    def forward(self) -> float:
        """All but the text encoder."""
        total: float = sum(getattr(self, field.name) for field in fields(self))
        return total - self.text_encoder


def parameter_count(config: ModelConfig) -> ParameterCount:
    """Return the parameters of a model, equal to the built one to the unit."""
    d, text = config.d_model, config.text
    table = config.n_codebooks * config.vocabulary * d
    block = sum(d + _sub_layer_parameters(config, kind) for kind in config.architecture.sub_layers)
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


def _sub_layer_parameters(config: ModelConfig, kind: SubLayer) -> int:
    d, inner = config.d_model, config.ff_mult * config.d_model
    if kind is SubLayer.MAMBA2:
        di, heads, states = config.d_inner, config.n_ssm_heads, config.n_groups * config.d_state
        convolution = (di + 2 * states) * (config.d_conv + 1)
        return d * (2 * di + 2 * states + heads) + convolution + 3 * heads + di + di * d
    if kind is SubLayer.FEED_FORWARD:
        return 2 * d * inner + inner + d
    return 4 * d * d


def forward_flops(
    config: ModelConfig,
    frames: int,
    text_positions: int,
    convention: FlopConvention = DEFAULT_CONVENTION,
) -> FlopCount:
    """Return the operations of a forward pass a position, for clips of `frames` under captions of
    `text_positions`.

    The delay pattern's extra steps and a prefix's positions are charged to the frames.
    """
    steps = frames + config.n_codebooks - 1
    prefix = text_positions if config.architecture.has_prefix and convention.prefix else 0
    length = prefix + steps
    blocks = {kind: float(config.n_blocks * config.architecture.sub_layers.count(kind)) for kind in SubLayer}
    a_position = length / frames  # from operations a position of the sequence to operations a frame
    a_text = text_positions / frames

    d, di = config.d_model, config.d_inner
    states = config.n_groups * config.d_state
    projections = 2 * d * (2 * di + 2 * states + config.n_ssm_heads) + 2 * di * d
    convolution = 2 * config.d_conv * (di + 2 * states)
    chunk = min(convention.scan_chunk, length)
    # Scores C B^T, their product with the values, and the states written and read.
    scan = 2 * chunk * states + 2 * chunk * di + 4 * config.d_state * di
    seen = length if convention.attention == "full" else (length + 1) / 2
    patch = 2 * (2 * config.text.patch * BYTE_WIDTH * config.text.dim + config.text.dim**2)
    return FlopCount(
        mixer=blocks[SubLayer.MAMBA2] * (projections + convolution) * a_position,
        scan=blocks[SubLayer.MAMBA2] * scan * a_position,
        attention=blocks[SubLayer.SELF_ATTENTION] * (8 * d * d + 4 * seen * d) * a_position,
        cross_attention=blocks[SubLayer.CROSS_ATTENTION]
        * ((4 * d * d + 4 * text_positions * d) * a_position + 4 * d * d * a_text),
        feed_forward=blocks[SubLayer.FEED_FORWARD] * 4 * config.ff_mult * d * d * a_position,
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
    """Return the operations of training a position: three forward passes, the text encoder not counted."""
    return convention.training_factor * forward_flops(config, frames, text_positions, convention).forward


def six_n(config: ModelConfig, *, embeddings: bool = True) -> float:
    """Return 6 N, the usual estimate of training operations a position: no scan, no attention, no prefix.

    embeddings: whether N counts embeddings and heads (arXiv 2203.15556) or not (arXiv 2001.08361).
    """
    count = parameter_count(config)
    return 6.0 * (count.n_params if embeddings else count.non_embedding)
