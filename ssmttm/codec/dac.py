"""DAC (arXiv 2306.06546) by transformers' DacModel: the paper's codec, on whose first codebook alone it trains."""

from math import ceil, prod
from typing import TYPE_CHECKING, Any

from ssmttm.codec.network import Network
from ssmttm.codec.weights import codec_folder, network_of

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT_MODEL = "descript/dac_44khz"

_WINDOW_SECONDS = 5  # 0.7 GB of activations at 44.1 kHz
_DILATIONS = 1 + 3 + 9  # of the three residual units of a block, each a convolution of 7


class DacNetwork(Network):
    """DAC's encoder, quantisers and decoder."""

    name = "dac"

    @property
    def arithmetic(self) -> dict[str, Any]:
        """Rates; all else shows in the weights."""
        config = self.module.config
        return {
            "sampling_rate": config.sampling_rate,
            "downsampling_ratios": list(config.downsampling_ratios),
        }

    @property
    def hop(self) -> int:
        """Samples a frame."""
        return prod(self.module.config.downsampling_ratios)

    @property
    def n_codebooks(self) -> int:
        """All it has: 9 at 44.1 kHz."""
        return int(self.module.config.n_codebooks)

    @property
    def window(self) -> int:
        """Frames taken through the network at once."""
        return ceil(_WINDOW_SECONDS * self.sample_rate / self.hop)

    @property
    def context(self) -> int:
        """Frames its convolutions reach to either side: parts have the codes and the sound of the whole."""
        reach, step = 3.0, 1  # samples; the first convolution is one of 7
        for ratio in self.module.config.downsampling_ratios:
            reach += (
                3 * _DILATIONS * step + ratio * step
            )  # residual units, then a convolution of twice the stride
            step *= ratio
        return 2 + ceil(reach / step) + 3  # the decoder begins with a convolution of 7 frames

    def encode(self, audio: "Tensor", n_codebooks: int) -> "Tensor":
        """Codes (batch, n_codebooks, frames) of audio (batch, samples)."""
        codes: Tensor = self.module.encode(audio[:, None], n_quantizers=n_codebooks).audio_codes
        return codes

    def decode(self, codes: "Tensor") -> "Tensor":
        """Audio (batch, samples) of codes (batch, codebooks, frames)."""
        audio: Tensor = self.module.decode(audio_codes=codes).audio_values
        return audio


def load_network(model: str = DEFAULT_MODEL) -> DacNetwork:
    """DAC from a folder or a name on the hub; raises InputError where it cannot be had."""
    return DacNetwork(network_of(codec_folder(model, "dac"), "DacConfig", "DacModel"))
