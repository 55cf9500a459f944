"""Find and identify the files of a pretrained text encoder, without loading them or torch."""

import contextlib
import hashlib
from pathlib import Path

from pydantic import RootModel, ValidationError

from ssmttm.files import read_document, sha256_file, write_atomically
from ssmttm.locks import file_lock
from ssmttm.pretrained import is_here, pretrained_folder, read_config

ENCODER_FILES = ("*.json", "*.txt", "*.model", "*.safetensors")
"""Files of an encoder; weights as safetensors only, since other formats are pickles."""
NOT_NUMBERS = {"data_config.json", "modules.json", "generation_config.json"}
"""Files that do not change the encoder's output."""


class _Hashes(RootModel[dict[str, str]]):
    """Path, size and time of change of a file -> sha256."""


def encoder_folder(encoder: str) -> Path:
    """Return the folder of an encoder's files: itself, or the hub's local copy; raises InputError if missing."""
    needs = "config.json, tokenizer files and model.safetensors"
    return pretrained_folder(encoder, "text encoder", ENCODER_FILES, needs)


def encoder_is_here(encoder: str) -> bool:
    """Return True if an encoder's files are on this machine, so that reading them downloads nothing."""
    return is_here(encoder, ENCODER_FILES)


def encoder_width(encoder: str) -> int | None:
    """Return the width of an encoder's embeddings by its config.json; None if the file does not give it."""
    fields = read_config(encoder_folder(encoder))
    width = fields.get("d_model", fields.get("hidden_size"))  # T5's key, and that of other models
    return width if isinstance(width, int) else None


def encoder_fingerprint(root: Path, encoder: str, *, remember: bool = True) -> str:
    """Return 64 hex digits over the encoder's files by name and content; raises InputError if files are missing.

    root: the folder of the embedding caches.
    """
    return files_fingerprint(root, encoder_folder(encoder), "text encoder 1", remember=remember)


def files_fingerprint(root: Path, folder: Path, kind: str, *, remember: bool = True) -> str:
    """Return 64 hex digits over the files of a model's folder by name and content, never by path.

    Each file is hashed once: hashes.json in the folder `root` keeps the hashes by size and time of change. Without
    `remember` it is read and not written.
    """
    names = {path.name: path for pattern in ENCODER_FILES for path in folder.glob(pattern)}
    memory = root / "hashes.json"
    if remember:
        root.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(kind.encode())
    with file_lock(root / "hashes.lock") if remember else contextlib.nullcontext():
        try:
            known = _Hashes.model_validate_json(read_document(memory)).root
        except (OSError, ValidationError):
            known = {}  # missing hashes are computed again
        before = len(known)
        for name in sorted(names.keys() - NOT_NUMBERS):
            path = names[name].resolve()
            stat = path.stat()
            key = f"{path} {stat.st_size} {stat.st_mtime_ns}"
            if key not in known:
                known[key] = sha256_file(path)
            digest.update(f"{name} {known[key]}\n".encode())
        if remember and len(known) > before:
            write_atomically(memory, _Hashes(known).model_dump_json().encode())
    return digest.hexdigest()
