"""Checkpoints of the encodec package, as weights of transformers' EncodecModel, which computes the same.

A file that is here is read without the package. Under its own name, `encodec_24khz`, the package finds or fetches what
its authors publish, with no hub between. Whatever else than tensors a file holds is never run.
"""

import os
import pickle
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from ssmttm.codec.weights import fill
from ssmttm.compat import tame_torchaudio, torchaudio_at_import
from ssmttm.errors import InputError
from ssmttm.files import sha256_file

PUBLISHED = "encodec_24khz"
"""What the package calls its mono model."""

_CHECKPOINTS = f"{PUBLISHED}-*.th"
_TENSORS_ALONE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_NAMES = (
    (r"^quantizer\.vq\.", "quantizer."),
    (r"\._codebook\.", ".codebook."),
    (r"^(encoder|decoder)\.model\.", r"\1.layers."),
    (r"\.(?:conv\.conv|convtr\.convtr)\.", ".conv."),
)


def package_model(model: str) -> Any | None:
    """The network of a checkpoint's path, of a folder that holds one, or of the package's name; None if it is neither.

    Raises InputError where the weights cannot be had, or are another model's.
    """
    path = Path(model).expanduser()
    if model == PUBLISHED and not path.exists():
        return _network(_published(), model)
    checkpoint = _checkpoint(path)
    return None if checkpoint is None else _network(_read(checkpoint), str(checkpoint))


def _checkpoint(path: Path) -> Path | None:
    """The package's checkpoint at a path or in a folder, if there is one and no other model."""
    if path.suffix == ".th" or not path.is_dir() or (path / "config.json").exists():
        return path if path.suffix == ".th" and path.is_file() else None
    if list(path.glob("encodec_48khz-*.th")) and not list(path.glob(_CHECKPOINTS)):
        raise InputError(f"{path}: holds the stereo model, which cannot be used; put {_CHECKPOINTS} there")
    return next(iter(sorted(path.glob(_CHECKPOINTS))), None)


def _read(path: Path) -> Mapping[str, Any]:
    """The tensors of a checkpoint; its file's name ends with the start of its own sha256."""
    import torch

    wanted = path.stem.rpartition("-")[2]
    if not path.match(_CHECKPOINTS) or not sha256_file(path).startswith(wanted):
        raise InputError(f"{path}: is not {_CHECKPOINTS} with the sha256 its name says; fetch it again")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(f"{path}: not a checkpoint of weights alone: {_brief(error)}") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(value, torch.Tensor) for value in tensors.values()
    ):
        raise InputError(
            f"{path}: not a checkpoint of weights alone: it holds other things than tensors by name"
        )
    return tensors


def _published() -> Mapping[str, Any]:
    """What the package finds in torch's folder of downloads, or fetches there."""
    with torchaudio_at_import():
        from encodec import EncodecModel
    try:
        with _tensors_alone(), redirect_stdout(sys.stderr):  # the output of a verb may be a document
            tensors: Mapping[str, Any] = EncodecModel.encodec_model_24khz().state_dict()
    except (OSError, RuntimeError, EOFError, AttributeError, TypeError, pickle.UnpicklingError) as error:
        raise InputError(
            f"codec model {PUBLISHED!r}: the encodec package has no whole copy in torch's folder of downloads and "
            f"could not fetch one ({_brief(error)}); name a file {_CHECKPOINTS} that was fetched elsewhere"
        ) from error
    return tensors


@contextmanager
def _tensors_alone() -> Iterator[None]:
    """Have torch.load, which the package calls, unpickle nothing but tensors."""
    before = os.environ.get(_TENSORS_ALONE)
    os.environ[_TENSORS_ALONE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_TENSORS_ALONE]
        else:
            os.environ[_TENSORS_ALONE] = before


def _network(tensors: Mapping[str, Any], where: str) -> Any:
    tame_torchaudio()
    from transformers import EncodecConfig, EncodecModel

    network = EncodecModel(EncodecConfig())  # the defaults are those of the 24 kHz model
    fill(network, {_renamed(name): tensor for name, tensor in tensors.items()}, where)
    return network


def _brief(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def _renamed(name: str) -> str:
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    return name
