"""The files of a pretrained text encoder: where they are and what they are, without loading them or torch."""

import hashlib
import json
import os
from pathlib import Path

from filelock import FileLock
from pydantic import RootModel, ValidationError

from ssmttm.errors import InputError

ENCODER_FILES = ("*.json", "*.txt", "*.model", "*.safetensors")
"""What an encoder consists of; weights as safetensors only, since other formats are pickles."""
NOT_NUMBERS = {"data_config.json", "modules.json", "generation_config.json"}
"""Files that do not change what the encoder returns."""


class _Hashes(RootModel[dict[str, str]]):
    """Path, size and time of change of a file -> sha256."""


def encoder_folder(encoder: str) -> Path:
    """Return the folder of an encoder's files: itself, or the hub's local copy; InputError if there is
    none.
    """
    folder = Path(encoder).expanduser()
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(encoder, allow_patterns=list(ENCODER_FILES)))
        except Exception as error:  # the hub's client raises a dozen kinds, for network, name and cache
            raise InputError(
                f"text encoder {encoder!r} is neither a folder nor a model the hub's cache has or can fetch: put "
                "its config.json, tokenizer files and model.safetensors into a folder and give that folder"
            ) from error
    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        raise InputError(
            f"text encoder {encoder!r}: {folder} lacks config.json or *.safetensors; put them there with the "
            "tokenizer's files"
        )
    return folder


def encoder_width(encoder: str) -> int | None:
    """Return the width of an encoder's embeddings by its config.json; None where that does not say."""
    path = encoder_folder(encoder) / "config.json"
    try:
        fields = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path}: is not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise InputError(f"{path}: holds {type(fields).__name__}, not an encoder's configuration")
    width = fields.get("d_model", fields.get("hidden_size"))  # T5's word, and everybody else's
    return width if isinstance(width, int) else None


def encoder_fingerprint(root: Path, encoder: str) -> str:
    """Return 64 hex digits over the encoder's files by name and content, never by path.

    Files are hashed once: `root`, the folder of the embedding caches, remembers them by size and time of
    change. Raises InputError where the files cannot be had.
    """
    folder = encoder_folder(encoder)
    names = {path.name: path for pattern in ENCODER_FILES for path in folder.glob(pattern)}
    memory = root / "hashes.json"
    root.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(b"text encoder 1")
    with FileLock(root / "hashes.lock"):
        try:
            known = _Hashes.model_validate_json(memory.read_bytes()).root
        except (OSError, ValidationError):
            known = {}  # only a memory: what it lacks is hashed again
        before = len(known)
        for name in sorted(names.keys() - NOT_NUMBERS):
            path = names[name].resolve()
            stat = path.stat()
            key = f"{path} {stat.st_size} {stat.st_mtime_ns}"
            if key not in known:
                with path.open("rb") as file:
                    known[key] = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{name} {known[key]}\n".encode())
        if len(known) > before:
            partial = memory.with_suffix(f".{os.getpid()}.partial")
            partial.write_text(_Hashes(known).model_dump_json())
            partial.replace(memory)
    return digest.hexdigest()
