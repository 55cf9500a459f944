"""Read checkpoints of the encodec package as weights of transformers' EncodecModel, which computes the same.

A local file is read without the package. For the name `encodec_24khz` the package itself finds or downloads the model
that its authors publish, without the hub. Nothing in a file but tensors is ever unpickled.
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
"""The package's name of its mono model."""

_CHECKPOINTS = f"{PUBLISHED}-*.th"
_TENSORS_ALONE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_NAMES = (
    (r"^quantizer\.vq\.", "quantizer."),
    (r"\._codebook\.", ".codebook."),
    (r"^(encoder|decoder)\.model\.", r"\1.layers."),
    (r"\.(?:conv\.conv|convtr\.convtr)\.", ".conv."),
)


def package_model(model: str) -> Any | None:
    """Return the network of a checkpoint file, of a folder with one, or of the package's name; None if it is neither.

    Raises InputError if the weights are missing, damaged, or those of another model.
    """
    path = Path(model).expanduser()
    if model == PUBLISHED and not path.exists():
        return _network(_published(), model)
    checkpoint = _checkpoint(path)
    return None if checkpoint is None else _network(_read(checkpoint), str(checkpoint))


def _checkpoint(path: Path) -> Path | None:
    """Return the package's checkpoint at a path, or in a folder that holds no model of another form."""
    if path.suffix == ".th" or not path.is_dir() or (path / "config.json").exists():
        return path if path.suffix == ".th" and path.is_file() else None
    if list(path.glob("encodec_48khz-*.th")) and not list(path.glob(_CHECKPOINTS)):
        raise InputError(f"{path}: holds the stereo model, which is not supported; put {_CHECKPOINTS} there")
    return next(iter(sorted(path.glob(_CHECKPOINTS))), None)


def _read(path: Path) -> Mapping[str, Any]:
    """Return the tensors of a checkpoint, whose file name ends with the start of its own sha256."""
    import torch

    wanted = path.stem.rpartition("-")[2]
    if not path.match(_CHECKPOINTS) or not sha256_file(path).startswith(wanted):
        raise InputError(
            f"{path}: is not a file {_CHECKPOINTS} with the sha256 in its name; download it again"
        )
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(f"{path}: not a checkpoint of weights alone: {_brief(error)}") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(value, torch.Tensor) for value in tensors.values()
    ):
        raise InputError(
            f"{path}: not a checkpoint of weights alone: it is not a mapping from names to tensors"
        )
    return tensors


def _published() -> Mapping[str, Any]:
    """Return the tensors that the package finds in torch's download folder, or downloads."""
    with torchaudio_at_import():
        from encodec import EncodecModel
    try:
        with _tensors_alone(), redirect_stdout(sys.stderr):  # stdout may be a command's JSON document
            tensors: Mapping[str, Any] = EncodecModel.encodec_model_24khz().state_dict()
    except (OSError, RuntimeError, EOFError, AttributeError, TypeError, pickle.UnpicklingError) as error:
        raise InputError(
            f"codec model {PUBLISHED!r}: the encodec package has no whole copy in torch's download folder and could "
            f"not download one ({_brief(error)}); download a file {_CHECKPOINTS} elsewhere and give its path"
        ) from error
    return tensors


@contextmanager
def _tensors_alone() -> Iterator[None]:
    """Make torch.load, which the package calls, unpickle nothing but tensors."""
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
