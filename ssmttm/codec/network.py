"""The network of a neural codec as NeuralCodec needs it; encodec.py and dac.py adapt the models of transformers."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import ceil, prod
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Tensor


class Network(ABC):
    """A network in evaluation mode and float32."""

    name: ClassVar[str]
    """Name of the codec."""
    arithmetic_keys: ClassVar[tuple[str, ...]]
    """Keys of the configuration that decide codes and do not show in the shapes of the weights."""
    window_seconds: ClassVar[float]
    """Seconds that go through the network at once; longer audio goes through in parts."""

    def __init__(self, module: Any, strides: Sequence[int], n_codebooks: int) -> None:
        """Adapt a model of transformers."""
        self.module, self.n_codebooks = module, n_codebooks
        self.config = module.config
        self.hop = prod(strides)  # samples a frame
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
