"""What a sub-layer says of itself before one is built, and the table of those there are.

Configuration, parameters, operations, memory and the grid of a study ask a layer's facts by its name; the module is
imported when a model is built. No torch in here: planning a study of a thousand models must not import it.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from ssmttm.text.config import LIMIT


class LayerConfig(BaseModel):
    """The part of a model's configuration that layers read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: str
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

    @property
    def d_inner(self) -> int:
        """Channels the mixer works on."""
        return self.expand * self.d_model

    @property
    def n_ssm_heads(self) -> int:
        """Heads of the scan."""
        return self.d_inner // self.ssm_head_dim


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


@dataclass(frozen=True)
class Pass:
    """A forward pass whose operations are charged to the frames of a clip."""

    n_layers: float
    """Layers of the kind asked for."""
    frames: int
    length: int
    """Positions of the sequence."""
    text_positions: int
    convention: FlopConvention

    @property
    def a_position(self) -> float:
        """Positions of the sequence a frame."""
        return self.length / self.frames

    @property
    def a_text(self) -> float:
        """Positions of the text a frame."""
        return self.text_positions / self.frames


@dataclass(frozen=True)
class Saved:
    """Floats that a layer holds in training, beside those of the residual stream around it."""

    kept: float
    """Kept for the backward pass, a position of the sequence."""
    at_once: float
    """Held at once in its backward pass, a position of the sequence."""
    of_text: float = 0.0
    """Kept for the backward pass, a position of the text."""


class Layer(ABC):
    """A sub-layer's facts."""

    name: ClassVar[str]
    module: ClassVar[str]
    """Where its `SubLayer` is, as package.module:Class."""
    keys: ClassVar[frozenset[str]] = frozenset()
    """Keys of LayerConfig it reads beside n_blocks, d_model and dropout; of other models they are no part."""
    attends_to_text: ClassVar[bool] = False
    """An architecture with such a layer has no prefix."""
    is_recurrent: ClassVar[bool] = False
    """True if it carries a state along, so that a model with it goes on beyond the lengths it was trained on."""

    def check(self, config: LayerConfig) -> None:  # noqa: B027  # most layers take any configuration
        """Raise ValueError that names the key where no such layer can be built."""

    def width_step(self, config: LayerConfig) -> int:  # noqa: ARG002
        """Return the number that d_model must be a multiple of; d_model itself is not to be read."""
        return 1

    @abstractmethod
    def matrices(self, config: LayerConfig) -> tuple[tuple[int, int], ...]:
        """Return the shapes of its weights that have two dimensions."""

    def vectors(self, config: LayerConfig) -> int:  # noqa: ARG002
        """Return how many parameters its other weights have."""
        return 0

    @abstractmethod
    def flops(self, config: LayerConfig, forward: Pass) -> Mapping[str, float]:
        """Return the operations a frame of all its layers in a forward pass, by what they are spent on."""

    @abstractmethod
    def saved(self, config: LayerConfig, length: int, *, half: float, on_cuda: bool) -> Saved:
        """Return what it holds in training; half: the size of an autocast number over that of a float."""

    def parameters(self, config: LayerConfig) -> int:
        """Return the number of its parameters."""
        return sum(rows * columns for rows, columns in self.matrices(config)) + self.vectors(config)


LAYERS: dict[str, Layer] = {}
"""Every layer by its name."""


def register(layer: Layer) -> None:
    """Make a layer known by its name; raises ValueError where another has it."""
    if layer.name in LAYERS:
        raise ValueError(f"there is a layer {layer.name!r} already")
    LAYERS[layer.name] = layer
