"""Files that are written whole or not at all, their hashes, and the base of the records they hold.

Arrays may come from other people: what a header says is compared with the file's size before memory is taken.
"""

import errno
import hashlib
import io
import json
import math
import os
import stat
import uuid
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO

from pydantic import BaseModel, ConfigDict
from pydantic_core import from_json

from ssmttm.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

MAX_DOCUMENT_BYTES = 2**26
"""Most bytes of a JSON file, which parsing may multiply by twenty."""
MAX_LINE_BYTES = 2**20
_READ_BYTES = 2**18
MAX_ARRAY_BYTES = 2**30
"""Most bytes of arrays that are read whole."""


class Frozen(BaseModel):
    """A record that never changes and has no keys but its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")


_PLAIN: set[str] = set()
"""Folders that this process found to be no other user's links."""


def check_links(path: Path) -> None:
    """Raise InputError if another user's link on the way to a path leads to what is not that user's.

    Who else may write under a ROOT could make this process write where only its user can. The path and its folder are
    looked at each time, those above once.
    """
    place = os.fspath(path)  # words, since a thousand runs make many paths
    if not place.startswith("/") or ".." in place:
        place = os.path.abspath(path)  # noqa: PTH100
    near = (place, place.rpartition("/")[0])
    while place and (place in near or place not in _PLAIN):
        if _is_foreign_link(place):
            raise InputError(f"{place}: is another user's link, through which nothing is written; remove it")
        if place not in near:
            _PLAIN.add(place)
        place = place.rpartition("/")[0]


def _is_foreign_link(place: str) -> bool:
    try:
        facts = os.lstat(place)
    except FileNotFoundError:
        return False
    is_others = stat.S_ISLNK(facts.st_mode) and facts.st_uid not in {os.geteuid(), 0}
    return is_others and os.stat(place).st_uid != facts.st_uid  # noqa: PTH116


def share_with_group(folder: Path) -> None:
    """Let the group write what this process makes, if a folder is a group's: set-group-ID and writable by the group.

    The kernel gives what is new there that group, but a umask of 022 would keep its members from writing it.
    """
    with suppress(OSError):
        mode = folder.stat().st_mode
        if mode & stat.S_ISGID and mode & stat.S_IWGRP:
            os.umask(os.umask(0o077) & ~0o070)


def new_mode(folder: Path) -> int:
    """Return the mode that a new file in a folder has, by the umask and the folder's default access control list."""
    trial = folder / f".{uuid.uuid4().hex}"
    descriptor = os.open(trial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)
        trial.unlink()


@contextmanager
def replacing(path: Path, mode: int = 0o666) -> Iterator[BinaryIO]:
    """Open a temporary file for writing, and rename it to `path` if the block succeeds."""
    check_links(path.parent)
    if not path.parent.is_dir():
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


def read_document(path: Path) -> bytes:
    """Read a JSON file whole; raises OSError, also for one of more than MAX_DOCUMENT_BYTES."""
    content = bytearray()
    with path.open("rb") as file:
        # read() takes memory for all that it is asked for, even of a small file.
        while piece := file.read(_READ_BYTES):
            content += piece
            if len(content) > MAX_DOCUMENT_BYTES:
                raise OSError(errno.EFBIG, f"holds more than {MAX_DOCUMENT_BYTES:,} bytes", str(path))
    return bytes(content)


def read_lines(path: Path, most: int = MAX_LINE_BYTES) -> Iterator[bytes]:
    """Yield the lines of a file with their ends; raises OSError, and InputError for one of more than `most` bytes."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(most + 1):
            number += 1
            if len(line) > most:
                raise InputError(f"{path}, line {number}: is longer than {most:,} bytes")
            yield line


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


def open_array(path: Path, dtype: str, shape: Sequence[int], says: str) -> "npt.NDArray[Any]":
    """Open an .npy file by memory map, read-only, if it holds just this type and shape.

    says: the origin of the expectation, such as `the manifest says`. Raises FileNotFoundError, and InputError with the
    file, what it holds and what was expected.
    """
    import numpy as np

    expected = f"{says} {np.dtype(dtype)} {tuple(shape)}"
    try:
        with path.open("rb") as file:
            found, held, by_column = _read_header(file)
            start, size = file.tell(), os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a whole array ({error}); {expected}") from None
    if found != np.dtype(dtype) or held != tuple(shape) or by_column:
        order = " by columns" if by_column else ""
        raise InputError(f"{path}: holds {found} {_short(held)}{order}; {expected}")
    if size - start != (wanted := math.prod(held) * found.itemsize):
        raise InputError(
            f"{path}: not a whole array ({size - start:,} bytes follow the header of {wanted:,}); {expected}"
        )
    return np.memmap(path, found, "r", start, held) if wanted else np.zeros(held, found)


def read_arrays(path: Path) -> "dict[str, npt.NDArray[Any]]":
    """Read every array of an .npz file.

    Raises OSError, and InputError with the file and the member: if a header does not agree with its member's size, or
    if the file or its arrays have more than MAX_ARRAY_BYTES.
    """
    if path.stat().st_size > MAX_ARRAY_BYTES:
        raise InputError(f"{path}: has more than {MAX_ARRAY_BYTES:,} bytes")
    content = path.read_bytes()
    try:
        return _unpack(content)
    except Exception as error:  # a flipped bit makes zipfile raise many kinds, RuntimeError among them
        raise InputError(f"{path}: not a whole file of arrays ({error})") from None


def _unpack(content: bytes) -> "dict[str, npt.NDArray[Any]]":
    import numpy as np

    arrays: dict[str, npt.NDArray[Any]] = {}
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        infos = archive.infolist()
        if (total := sum(info.file_size for info in infos)) > MAX_ARRAY_BYTES:
            raise ValueError(f"it would unpack to {total:,} bytes, and at most {MAX_ARRAY_BYTES:,} are read")
        for info in infos:
            with archive.open(info) as file:
                dtype, shape, by_column = _read_header(file)
                size, wanted = info.file_size - file.tell(), math.prod(shape) * dtype.itemsize
                if dtype.hasobject or size != wanted or len(data := file.read()) != wanted:
                    held = f"{dtype} {_short(shape)}, and {size:,} bytes in place of {wanted:,}"
                    raise ValueError(f"{info.filename} holds {held}")
            array = np.frombuffer(bytearray(data), dtype)
            arrays[info.filename.removesuffix(".npy")] = array.reshape(shape, order="F" if by_column else "C")
    return arrays


def _read_header(file: IO[bytes]) -> "tuple[np.dtype[Any], tuple[int, ...], bool]":
    """Return an array's type and shape, and True if its columns come first; raises ValueError."""
    import numpy as np

    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        version = np.lib.format.read_magic(file)
        shape, by_column, dtype = readers[version](file)
    except KeyError:
        raise ValueError(f"its format has the unknown version {version}") from None
    except Exception as error:  # of NumPy, or of Python's own parser, which reads the header
        raise ValueError(f"its header is damaged ({type(error).__name__})") from None
    if any(type(length) is not int or length < 0 for length in shape):
        raise ValueError(f"its header has the shape {_short(shape)}")
    return dtype, shape, by_column and len(shape) > 1


def _short(shape: tuple[int, ...]) -> str:
    text = str(shape)
    return text if len(text) <= 80 else f"{text[:77]}..."
