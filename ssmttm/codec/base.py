"""The protocol of every codec.

A codec turns audio into codes and back. A corpus keeps its codec in its `codec` folder, whose `codec.json` names the
kind, so that the output of a model trained on the corpus can be decoded without any other file.
"""

from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ssmttm.codec.facts import CodecFacts

CODEC_FILE = "codec.json"

Audio = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint16]


class Codec(Protocol):
    """Audio to codes and back."""

    @property
    def facts(self) -> CodecFacts:
        """Rates, codebooks, entries and fingerprint."""

    def encode(self, audio: Audio) -> Codes:
        """Return codes (batch, codebooks, frames) of mono audio (batch, samples) at the codec's sample rate."""

    def decode(self, codes: Codes) -> Audio:
        """Return mono audio (batch, samples) in [-1, 1] of codes (batch, codebooks, frames)."""

    def save(self, folder: Path) -> None:
        """Write the codec to a folder, `codec.json` last."""
