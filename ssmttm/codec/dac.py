"""DAC (arXiv 2306.06546) by transformers' DacModel: the codec of arXiv 2601.14786, which uses its first codebook."""

from math import ceil
from typing import TYPE_CHECKING, Any

from ssmttm.codec.network import Network
from ssmttm.codec.weights import codec_folder, network_of

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT_MODEL = "descript/dac_44khz"

_DILATIONS = 1 + 3 + 9  # of the three residual units of a block, each a convolution of 7


class DacNetwork(Network):
    """DAC's encoder, quantisers and decoder."""

    name = "dac"
    arithmetic_keys = ("sampling_rate", "downsampling_ratios")
    window_seconds = 5  # 0.7 GB of activations at 44.1 kHz

    @property
    def context(self) -> int:
        """Frames that the convolutions reach to either side: parts get exactly the codes and sound of the whole."""
        reach, step = 3.0, 1  # samples; the first convolution is one of 7
        for ratio in self.config.downsampling_ratios:
            # The residual units, then a convolution of twice the stride.
            reach += 3 * _DILATIONS * step + ratio * step
            step *= ratio
        return 2 + ceil(reach / step) + 3  # the decoder begins with a convolution of 7 frames

    def encode(self, audio: "Tensor", n_codebooks: int) -> "Tensor":
        """Return codes (batch, n_codebooks, frames) of audio (batch, samples)."""
        codes: Tensor = self.module.encode(audio[:, None], n_quantizers=n_codebooks).audio_codes
        return codes

    def decode(self, codes: "Tensor") -> "Tensor":
        """Return audio (batch, samples) of codes (batch, codebooks, frames)."""
        audio: Tensor = self.module.decode(audio_codes=codes).audio_values
        return audio


def load_network(model: str | None) -> DacNetwork:
    """Load DAC from a folder or by a name on the hub; raises InputError if its files are missing or damaged."""
    module: Any = network_of(codec_folder(model or DEFAULT_MODEL, "dac"), "DacConfig", "DacModel")
    return DacNetwork(module, module.config.downsampling_ratios, module.config.n_codebooks)
