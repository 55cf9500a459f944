"""A codec from the folder that describes it."""

import json
from pathlib import Path

from ssmttm.codec.base import CODEC_FILE, Codec
from ssmttm.errors import InputError


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
