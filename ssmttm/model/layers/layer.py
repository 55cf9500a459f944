"""The facts of a sub-layer, known before a module is built, and the table of all layers.

Configuration, parameters, operations, memory and the grid of a study read a layer's facts by its name; the module is
imported when a model is built. Free of torch, because plans of a thousand models must not import it.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from pydantic import Field

from ssmttm.files import Frozen
from ssmttm.text.config import LIMIT


class LayerConfig(Frozen):
    """The part of a model's configuration that layers read."""

    architecture: str
    n_blocks: int = Field(strict=True, ge=1, lt=LIMIT)
    d_model: int = Field(strict=True, ge=2, lt=LIMIT)
    d_state: int = Field(strict=True, default=512, ge=1, lt=LIMIT)
    """Width of the state of a channel."""
    d_conv: int = Field(strict=True, default=4, ge=2, lt=LIMIT)
    """Taps of the causal convolution in front of the scan."""
    expand: int = Field(strict=True, default=2, ge=1, lt=LIMIT)
    """Channels of the mixer over d_model."""
    ssm_head_dim: int = Field(strict=True, default=64, ge=1, lt=LIMIT)
    """Channels that share one decay in the scan."""
    n_groups: int = Field(strict=True, default=1, ge=1, lt=LIMIT)
    """Groups of scan heads with their own B and C."""
    head_dim: int = Field(strict=True, default=64, ge=1, lt=LIMIT)
    """Channels of an attention head."""
    ff_mult: int = Field(strict=True, default=2, ge=1, lt=LIMIT)
    """Inner width of the feed-forward layer over d_model."""
    dropout: float = Field(default=0.3, ge=0.0, lt=1.0)
    """Probability, on the output of every sub-layer and inside the feed-forward layer."""

    @property
    def d_inner(self) -> int:
        """Channels of the mixer."""
        return self.expand * self.d_model

    @property
    def n_ssm_heads(self) -> int:
        """Heads of the scan."""
        return self.d_inner // self.ssm_head_dim


@dataclass(frozen=True)
class FlopConvention:
    """The choices in a count of operations."""

    attention: Literal["causal", "full"] = "causal"
    """Count self-attention over the positions that each position sees, half on average, or over all."""
    scan_chunk: int = 256
    """Chunk of the state-space scan (mamba_ssm's default); a larger one costs more operations inside chunks."""
    prefix: bool = True
    """True to count the positions of a prefix; those of a cross model's text always count."""
    training_factor: float = 3.0
    """Operations of a training step over those of its forward pass (the backward pass costs two)."""


class Pass(NamedTuple):
    """A forward pass whose operations are counted per frame of a clip."""

    n_layers: float
    """Number of layers of the kind."""
    frames: int
    length: int
    """Positions of the sequence."""
    text_positions: int
    convention: FlopConvention

    @property
    def a_position(self) -> float:
        """Positions of the sequence per frame."""
        return self.length / self.frames

    @property
    def a_text(self) -> float:
        """Positions of the text per frame."""
        return self.text_positions / self.frames


class Saved(NamedTuple):
    """Floats that a layer holds in training, without those of the residual stream around it."""

    kept: float
    """Kept for the backward pass, per position of the sequence."""
    at_once: float
    """Held at once in its backward pass, per position of the sequence."""
    of_text: float = 0.0
    """Kept for the backward pass, per position of the text."""


class How(NamedTuple):
    """The way a model is computed, as far as it decides on what is kept for the backward pass."""

    half: float = 1.0
    """Size of an autocast number over that of a float."""
    on_cuda: bool = False
    is_fused: bool = False
    """True if mamba-ssm's kernels do a mixer's work."""

    def mask(self, width: int) -> float:
        """Return the floats that dropout keeps of so many elements: a byte each on CUDA, else factors."""
        return width / 4 if self.on_cuda else self.half * width


class Layer(ABC):
    """A sub-layer's facts."""

    name: ClassVar[str]
    module: ClassVar[str]
    """Import path of its `SubLayer`, as package.module:Class."""
    keys: ClassVar[frozenset[str]] = frozenset()
    """Keys of LayerConfig it reads beside n_blocks, d_model and dropout; models without the layer leave them out."""
    attends_to_text: ClassVar[bool] = False
    """True if it attends to the text, so that its architecture has no prefix."""
    is_recurrent: ClassVar[bool] = False
    """True if it carries a state, so that a model can continue beyond the lengths of its training."""

    def check(self, config: LayerConfig) -> None:  # noqa: B027  # most layers take any configuration
        """Raise ValueError that names the key if the layer cannot be built."""

    def width_step(self, config: LayerConfig) -> int:  # noqa: ARG002
        """Return the number that d_model must be a multiple of, without reading d_model."""
        return 1

    @abstractmethod
    def matrices(self, config: LayerConfig) -> tuple[tuple[int, int], ...]:
        """Return the shapes of its weights with two dimensions."""

    def vectors(self, config: LayerConfig) -> int:  # noqa: ARG002
        """Return the number of parameters in its other weights."""
        return 0

    @abstractmethod
    def flops(self, config: LayerConfig, forward: Pass) -> Mapping[str, float]:
        """Return the operations per frame of all its layers in a forward pass, by purpose."""

    @abstractmethod
    def saved(self, config: LayerConfig, length: int, how: How) -> Saved:
        """Return the floats it holds in training."""

    def parameters(self, config: LayerConfig) -> int:
        """Return the number of its parameters."""
        return sum(rows * columns for rows, columns in self.matrices(config)) + self.vectors(config)


LAYERS: dict[str, Layer] = {}
"""Every layer by its name."""


def register(layer: Layer) -> None:
    """Register a layer under its name; raises ValueError if the name is taken."""
    if layer.name in LAYERS:
        raise ValueError(f"a layer {layer.name!r} exists already")
    LAYERS[layer.name] = layer
