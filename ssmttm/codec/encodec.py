"""EnCodec (arXiv 2210.13438) by transformers' EncodecModel, from its files or from a checkpoint of the encodec package.

Models that write down more than codes (the stereo one, whose segments overlap and have a loudness each) are refused: a
language model would have to make that up.
"""

from math import ceil, prod
from typing import TYPE_CHECKING, Any

from ssmttm.codec.encodec_package import package_model
from ssmttm.codec.network import Network
from ssmttm.codec.weights import codec_folder, network_of
from ssmttm.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT_MODEL = "facebook/encodec_24khz"

_WINDOW_SECONDS, _CONTEXT_SECONDS = 30, 1  # 0.5 GB of activations at 24 kHz
_ARITHMETIC = (
    "sampling_rate",
    "upsampling_ratios",
    "norm_type",
    "use_causal_conv",
    "pad_mode",
    "trim_right_ratio",
    "dilation_growth_rate",
    "num_residual_layers",
)


class EncodecNetwork(Network):
    """EnCodec's encoder, quantisers and decoder."""

    name = "encodec"

    @property
    def arithmetic(self) -> dict[str, Any]:
        """Rates, paddings and dilations."""
        config = self.module.config
        fields = {name: getattr(config, name) for name in _ARITHMETIC}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    @property
    def hop(self) -> int:
        """Samples a frame."""
        return prod(self.module.config.upsampling_ratios)

    @property
    def n_codebooks(self) -> int:
        """All it has: 32 at 24 kHz, where all of them take 24 kbit a second."""
        return int(self.module.config.num_quantizers)

    @property
    def window(self) -> int:
        """Frames taken through the network at once: clips of the usual lengths are whole."""
        return ceil(_WINDOW_SECONDS * self.sample_rate / self.hop)

    @property
    def context(self) -> int:
        """Frames to either side of a part; the LSTM remembers further, but little."""
        return ceil(_CONTEXT_SECONDS * self.sample_rate / self.hop)

    def encode(self, audio: "Tensor", n_codebooks: int) -> "Tensor":
        """Codes (batch, n_codebooks, frames) of audio (batch, samples)."""
        # Codebooks are counted in bandwidth there: the lowest that has enough of them.
        books_of = self.module.quantizer.get_num_quantizers_for_bandwidth
        widths = [width for width in self.module.config.target_bandwidths if books_of(width) >= n_codebooks]
        codes: Tensor = self.module.encode(audio[:, None], bandwidth=min(widths)).audio_codes[0]
        return codes[:, :n_codebooks]

    def decode(self, codes: "Tensor") -> "Tensor":
        """Audio (batch, samples) of codes (batch, codebooks, frames)."""
        audio: Tensor = self.module.decode(codes[None], [None]).audio_values
        return audio[:, 0]


def load_network(model: str = DEFAULT_MODEL) -> EncodecNetwork:
    """EnCodec from a folder or a name on the hub, or from the encodec package: its checkpoint or its name of a model.

    Raises InputError where the model cannot be had, or where it is one whose codes are not all it writes down.
    """
    module: Any = package_model(model)
    if module is None:
        module = network_of(codec_folder(model, "encodec"), "EncodecConfig", "EncodecModel")
    config = module.config
    if config.audio_channels != 1 or config.normalize or config.chunk_length_s is not None:
        raise InputError(
            f"codec model {model!r}: takes {config.audio_channels} channels in normalised, overlapping segments; "
            "only mono models whose codes are all there is can be used, such as facebook/encodec_24khz"
        )
    return EncodecNetwork(module)
