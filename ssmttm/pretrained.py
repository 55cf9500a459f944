"""Find the files of a pretrained model: in a folder, or in the hub's copy on this machine, downloaded if missing.

Weights must be safetensors, since other formats are pickles, which can run code.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssmttm.errors import InputError
from ssmttm.files import parse_json, read_document

CONFIG = "config.json"


def pretrained_folder(model: str, what: str, patterns: Sequence[str], needs: str) -> Path:
    """Return the folder of a model's files: itself, or the hub's local copy, downloaded if missing.

    model: a folder or a name on the hub. what: the kind of model in messages, such as `text encoder`. patterns: its
    files. needs: its required files, in words. Raises InputError if they are missing.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        # A local copy is used without asking the hub, so that a model that changes there stays the same here.
        folder = _copy_of_hub(model, patterns) or _download(model, what, patterns, needs)
    if not _whole(folder):
        raise InputError(f"{what} {model!r}: {folder} lacks {CONFIG} or *.safetensors; put {needs} there")
    return folder


def is_here(model: str, patterns: Sequence[str]) -> bool:
    """Return True if a model's files need no download: for any folder, or for a whole local copy of the hub's."""
    return Path(model).expanduser().is_dir() or _copy_of_hub(model, patterns) is not None


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of config.json in a model's folder; raises InputError if it is not a JSON object."""
    path = folder / CONFIG
    try:
        fields = parse_json(read_document(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise InputError(f"{path}: is not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise InputError(f"{path}: holds {type(fields).__name__}, not a model's configuration")
    return fields


def _download(model: str, what: str, patterns: Sequence[str], needs: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=list(patterns)))
    except Exception as error:  # the hub's client raises errors of a dozen kinds, for network, name and cache
        raise InputError(
            f"{what} {model!r} is neither a folder nor a model that the hub's cache holds or can download: put its "
            f"{needs} into a folder and give that folder"
        ) from error


def _copy_of_hub(model: str, patterns: Sequence[str]) -> Path | None:
    """Return the hub's whole copy of a model on this machine, if any."""
    from huggingface_hub import snapshot_download

    try:
        here = Path(snapshot_download(model, allow_patterns=list(patterns), local_files_only=True))
    except Exception:  # missing, or not a name: the download reports it better
        return None
    return here if _whole(here) else None


def _whole(folder: Path) -> bool:
    """Return True if config.json and all files of the weights are there."""
    index = folder / "model.safetensors.index.json"
    if not (folder / CONFIG).is_file():
        return False
    if index.is_file():
        try:
            parts = set(parse_json(read_document(index))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False
        return all((folder / str(part)).is_file() for part in parts)
    return any(folder.glob("*.safetensors"))
