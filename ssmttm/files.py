"""Files that are written whole or not at all, their hashes, and the base of the records they hold."""

import hashlib
import json
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import BaseModel, ConfigDict
from pydantic_core import from_json

from ssmttm.errors import InputError


class Frozen(BaseModel):
    """A record that never changes and has no keys but its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def check_links(path: Path) -> None:
    """Raise InputError if another user's link on the way to a path leads to what is not that user's.

    Who else may write under a ROOT could make this process write where only its user can.
    """
    for place in (path, *path.absolute().parents):
        with suppress(FileNotFoundError):
            facts = place.lstat()
            is_foreign = stat.S_ISLNK(facts.st_mode) and facts.st_uid not in {os.geteuid(), 0}
            if is_foreign and place.stat().st_uid != facts.st_uid:
                raise InputError(
                    f"{place}: is another user's link, through which nothing is written; remove it"
                )


@contextmanager
def replacing(path: Path, mode: int = 0o666) -> Iterator[BinaryIO]:
    """Open a temporary file for writing, and rename it to `path` if the block succeeds."""
    check_links(path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with os.fdopen(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        with suppress(OSError):  # the disk may have become read-only
            temporary.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Write a whole file under a temporary name, then rename it to `path`."""
    with replacing(path, mode) as file:
        file.write(data)


def parse_json(text: str | bytes) -> Any:
    """Parse JSON of any origin; raises ValueError, also for a document nested thousands of levels deep."""
    return from_json(text)


def canonical_json(value: Any) -> str:
    """Return the one JSON text of a value: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file in hex, reading the file in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
