"""What every codec offers, and the one place that knows how to load a saved one by its name.

A codec turns audio into codes and back. A corpus keeps the codec that made it in its `codec` folder, whose
`codec.json` names the kind; models trained on the corpus can then be listened to without anything else.
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
        """What a model needs to know: rates, codebooks, entries, fingerprint."""
        ...

    @property
    def fingerprint(self) -> str:
        """sha256 over everything that decides which codes an audio signal gets."""
        ...

    def encode(self, audio: Audio) -> Codes:
        """Codes (batch, codebooks, frames) of mono audio (batch, samples) at the codec's sample rate."""
        ...

    def decode(self, codes: Codes) -> Audio:
        """Mono audio (batch, samples) in [-1, 1] of codes (batch, codebooks, frames)."""
        ...

    def save(self, folder: Path) -> None:
        """Write the codec to a folder, `codec.json` last."""
        ...
