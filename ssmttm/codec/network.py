"""The network of a neural codec as NeuralCodec needs it; encodec.py and dac.py adapt the models of transformers."""

from abc import ABC, abstractmethod
from math import ceil, prod
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Tensor


class Network(ABC):
    """A network in evaluation mode and float32."""

    name: ClassVar[str]
    """Name of the codec."""
    ratios: ClassVar[str]
    """Key of the configuration that holds the strides, whose product is a frame's samples."""
    arithmetic_keys: ClassVar[tuple[str, ...]]
    """Keys of the configuration that decide codes and do not show in the shapes of the weights."""
    codebooks_key: ClassVar[str]
    """Key of the configuration that holds the number of codebooks."""
    window_seconds: ClassVar[float]
    """Seconds that go through the network at once; longer audio goes through in parts."""

    def __init__(self, module: Any) -> None:
        """Adapt a model of transformers."""
        self.module = module
        self.config = module.config
        self.hop: int = prod(getattr(self.config, self.ratios))  # samples a frame
        self.n_codebooks = int(getattr(self.config, self.codebooks_key))
        self.sample_rate = int(self.config.sampling_rate)  # Hz
        self.codebook_size = int(self.config.codebook_size)

    @property
    def arithmetic(self) -> dict[str, Any]:
        """Values of `arithmetic_keys`, as JSON holds them."""
        values = {key: getattr(self.config, key) for key in self.arithmetic_keys}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @property
    def window(self) -> int:
        """Frames that go through the network at once."""
        return ceil(self.window_seconds * self.sample_rate / self.hop)

    @property
    @abstractmethod
    def context(self) -> int:
        """Frames on either side of a part that the network must see to give the codes it gives for the whole."""

    @abstractmethod
    def encode(self, audio: "Tensor", n_codebooks: int) -> "Tensor":
        """Return codes (batch, n_codebooks, frames) of audio (batch, frames x hop)."""

    @abstractmethod
    def decode(self, codes: "Tensor") -> "Tensor":
        """Return audio (batch, about frames x hop) of codes (batch, codebooks, frames) of the first codebooks."""
