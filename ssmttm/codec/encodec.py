"""EnCodec (arXiv 2210.13438) by transformers' EncodecModel, from its files or from a checkpoint of the encodec package.

Models whose output is more than codes are refused, such as the stereo model, whose overlapping segments have a
loudness each: a language model of the codes cannot generate the rest.
"""

from math import ceil
from typing import TYPE_CHECKING, Any, ClassVar

from ssmttm.codec.encodec_package import package_model
from ssmttm.codec.network import Network
from ssmttm.codec.weights import codec_folder, network_of
from ssmttm.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT_MODEL = "facebook/encodec_24khz"


class EncodecNetwork(Network):
    """EnCodec's encoder, quantisers and decoder."""

    name = "encodec"
    arithmetic_keys = (
        "sampling_rate",
        "upsampling_ratios",
        "norm_type",
        "use_causal_conv",
        "pad_mode",
        "trim_right_ratio",
        "dilation_growth_rate",
        "num_residual_layers",
    )
    window_seconds = 30  # 0.5 GB of activations at 24 kHz; clips of the usual lengths stay whole
    context_seconds: ClassVar[float] = 1.0

    @property
    def context(self) -> int:
        """Frames on either side of a part; the LSTM remembers more than these, with little effect."""
        return ceil(self.context_seconds * self.sample_rate / self.hop)

    def encode(self, audio: "Tensor", n_codebooks: int) -> "Tensor":
        """Return codes (batch, n_codebooks, frames) of audio (batch, samples)."""
        # EnCodec counts codebooks in bandwidth: take the lowest bandwidth that has enough of them.
        books_of = self.module.quantizer.get_num_quantizers_for_bandwidth
        widths = [width for width in self.config.target_bandwidths if books_of(width) >= n_codebooks]
        codes: Tensor = self.module.encode(audio[:, None], bandwidth=min(widths)).audio_codes[0]
        return codes[:, :n_codebooks]

    def decode(self, codes: "Tensor") -> "Tensor":
        """Return audio (batch, samples) of codes (batch, codebooks, frames)."""
        audio: Tensor = self.module.decode(codes[None], [None]).audio_values
        return audio[:, 0]


def load_network(model: str | None) -> EncodecNetwork:
    """Load EnCodec from a folder, by a name on the hub, or from the encodec package by a checkpoint or model name.

    Raises InputError if the files are missing or damaged, or if the output of the model is more than codes.
    """
    name = model or DEFAULT_MODEL
    module: Any = package_model(name)
    if module is None:
        module = network_of(codec_folder(name, "encodec"), "EncodecConfig", "EncodecModel")
    config = module.config
    if config.audio_channels != 1 or config.normalize or config.chunk_length_s is not None:
        raise InputError(
            f"codec model {name!r}: its output ({config.audio_channels} channels, normalised or overlapping segments) "
            "is more than codes; use a mono model, such as facebook/encodec_24khz"
        )
    return EncodecNetwork(module, config.upsampling_ratios, config.num_quantizers)
