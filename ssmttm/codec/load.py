"""Open the codec that a folder describes."""

from pathlib import Path

from ssmttm.codec.base import CODEC_FILE, Codec
from ssmttm.errors import InputError
from ssmttm.files import parse_json, read_document


def load_codec(folder: Path, device: str = "cpu") -> Codec:
    """Load the codec of a folder; raises InputError if it is missing, damaged or of an unknown kind.

    device: `cpu` or `cuda`, where a neural codec computes; rvq always computes on the CPU.
    """
    path = folder / CODEC_FILE
    codec: Codec
    try:
        description = parse_json(read_document(path))
        kind = description["name"]
        if kind not in {"rvq", "encodec", "dac"}:
            raise InputError(f"{path}: name is {kind!r}; known codecs: rvq, encodec, dac")
        if kind == "rvq":
            from ssmttm.codec.rvq import ARRAYS, RvqCodec

            codec, file = RvqCodec.load(folder, description), ARRAYS
        else:
            from ssmttm.codec.neural import WEIGHTS, NeuralCodec

            codec = NeuralCodec.of_model(kind, str(folder), int(description["codebooks"]), device)
            file = WEIGHTS
    except FileNotFoundError as error:
        raise InputError(f"{folder}: no codec here: {Path(error.filename).name} is missing") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: this version cannot read the codec: {error!r}") from error
    if codec.facts.fingerprint != description.get("fingerprint"):
        raise InputError(
            f"{folder / file}: does not match the fingerprint in {CODEC_FILE}; build the corpus again"
        )
    return codec
