"""Where the files of a pretrained model are: a folder, or the hub's copy of it on this machine, fetched at need.

Weights are taken as safetensors only, since other formats are pickles, which run what they hold.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssmttm.errors import InputError

CONFIG = "config.json"


def pretrained_folder(model: str, what: str, patterns: Sequence[str], needs: str) -> Path:
    """Return the folder of a model's files: itself, or the hub's local copy, which is fetched where there is none.

    model: a folder or a name on the hub. what: how messages call it, such as `text encoder`. patterns: the files it
    consists of; needs: those it cannot do without, in words. Raises InputError where they cannot be had.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        folder = _from_hub(model, what, patterns, needs)
    if not _whole(folder):
        raise InputError(f"{what} {model!r}: {folder} lacks {CONFIG} or *.safetensors; put {needs} there")
    return folder


def is_here(model: str, patterns: Sequence[str]) -> bool:
    """Whether a model's files need not be fetched: a folder, whatever is in it, or a whole copy of the hub's."""
    return Path(model).expanduser().is_dir() or _copy_of_hub(model, patterns) is not None


def read_config(folder: Path) -> dict[str, Any]:
    """Return what config.json of a model's folder says; raises InputError where it is not a JSON object."""
    path = folder / CONFIG
    try:
        fields = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path}: is not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise InputError(f"{path}: holds {type(fields).__name__}, not a model's configuration")
    return fields


def _from_hub(model: str, what: str, patterns: Sequence[str], needs: str) -> Path:
    # What is here is used as it is: no network is asked, and a model that moves on there stays the same here.
    here = _copy_of_hub(model, patterns)
    if here is not None:
        return here
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=list(patterns)))
    except Exception as error:  # the hub's client raises a dozen kinds, for network, name and cache
        raise InputError(
            f"{what} {model!r} is neither a folder nor a model the hub's cache has or can fetch: put its {needs} "
            "into a folder and give that folder"
        ) from error


def _copy_of_hub(model: str, patterns: Sequence[str]) -> Path | None:
    """The hub's whole copy of a model on this machine."""
    from huggingface_hub import snapshot_download

    try:
        here = Path(snapshot_download(model, allow_patterns=list(patterns), local_files_only=True))
    except Exception:  # not here, or not a name at all, which fetching it says better
        return None
    return here if _whole(here) else None


def _whole(folder: Path) -> bool:
    """Whether config.json and the weights are there, all parts of them where they are several files."""
    index = folder / "model.safetensors.index.json"
    if not (folder / CONFIG).is_file():
        return False
    if index.is_file():
        try:
            parts = set(json.loads(index.read_bytes())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            return False
        return all((folder / str(part)).is_file() for part in parts)
    return any(folder.glob("*.safetensors"))
