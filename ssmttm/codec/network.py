"""What a neural codec's network offers, whichever model of transformers it is: encodec.py and dac.py say how."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Network(ABC):
    """A network in evaluation mode and float32."""

    module: Any
    """The model of transformers."""
    name: ClassVar[str]
    """What the codec is called: `encodec` or `dac`."""

    @property
    def config(self) -> dict[str, Any]:
        """What config.json says."""
        fields: dict[str, Any] = self.module.config.to_dict()
        return fields

    @property
    def sample_rate(self) -> int:
        """Hz."""
        return int(self.module.config.sampling_rate)

    @property
    def codebook_size(self) -> int:
        """Entries of a codebook."""
        return int(self.module.config.codebook_size)

    @property
    @abstractmethod
    def arithmetic(self) -> dict[str, Any]:
        """The part of the configuration that decides codes and cannot be seen in the shapes of the weights."""

    @property
    @abstractmethod
    def hop(self) -> int:
        """Samples a frame."""

    @property
    @abstractmethod
    def n_codebooks(self) -> int:
        """All it has."""

    @property
    @abstractmethod
    def window(self) -> int:
        """Frames taken through the network at once; longer audio goes through in parts."""

    @property
    @abstractmethod
    def context(self) -> int:
        """Frames beside a part that the network must see to give the codes it would give to the whole."""

    @abstractmethod
    def encode(self, audio: "Tensor", n_codebooks: int) -> "Tensor":
        """Codes (batch, n_codebooks, frames) of audio (batch, frames x hop)."""

    @abstractmethod
    def decode(self, codes: "Tensor") -> "Tensor":
        """Audio (batch, about frames x hop) of codes (batch, codebooks, frames), of the first codebooks."""
