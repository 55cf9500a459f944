"""What every codec offers, and the one place that knows how to load a saved one by its name.

A codec turns audio into codes and back. A corpus keeps the codec that made it in its `codec` folder, whose
`codec.json` names the kind; models trained on the corpus can then be listened to without anything else.
"""

import json
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ssmttm.corpus.manifest import CodecFacts
from ssmttm.errors import InputError

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


def load_codec(folder: Path, device: str = "cpu") -> Codec:
    """Load the codec of a folder; raises InputError when it is missing, damaged or of an unknown kind.

    device: where a neural codec computes, `cpu` or `cuda`; rvq needs none.
    """
    path = folder / CODEC_FILE
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        kind = description["name"]
    except FileNotFoundError:
        raise InputError(f"{folder}: no codec here ({CODEC_FILE} is missing)") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a codec's description: {error!r}") from None
    if kind == "rvq":
        from ssmttm.codec.rvq import RvqCodec

        return RvqCodec.load(folder)
    if kind in {"encodec", "dac"}:
        from ssmttm.codec.neural import NeuralCodec

        return NeuralCodec.load(folder, kind, device)
    raise InputError(f"{path}: name is {kind!r}; known codecs: rvq, encodec, dac")
