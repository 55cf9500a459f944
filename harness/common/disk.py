"""Writing to a disk that may fill up: a file or a line is written whole or not at all, and DiskFull names the path."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from ssmttm import files
from ssmttm.errors import InputError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Error numbers of a full disk, of an exhausted quota and of a file system that is read-only."""

FULL_MESSAGES = (
    *map(os.strerror, FULL),
    "PytorchStreamWriter failed writing",
    "inline_container.cc",
    "basic_ios::clear: iostream error",
)
"""Messages of libraries on a full disk; torch's writer reports no error number where the system wrote too few bytes."""

SLACK = 2**20
"""Bytes a file system needs beside those of its files."""


class DiskFull(Exception):
    """A disk is full, or read-only, as Linux makes one with errors; the same command continues when it is writable."""

    def __init__(self, path: Path | str, needed: int | None = None, *, is_read_only: bool = False) -> None:
        wanted = "" if needed is None else f", and {needed / 2**20:.1f} MiB are needed"
        why = "its file system is read-only" if is_read_only else f"its disk is full{wanted}"
        super().__init__(f"{path}: {why}")
        self.path, self.needed, self.is_read_only = Path(path), needed, is_read_only

    @property
    def remedy(self) -> str:
        """Advice to the user, as the beginning of a sentence."""
        return "make it writable" if self.is_read_only else "free some space"


def is_full(error: BaseException) -> bool:
    """True if an error, or one that caused it, comes from a full or read-only disk."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, DiskFull) or getattr(found, "errno", None) in FULL:
            return True
        if any(message in str(found) for message in FULL_MESSAGES):
            return True
        found = found.__cause__ or found.__context__
    return False


def disk_full(path: Path, error: BaseException, needed: int | None = None) -> DiskFull:
    """Return the DiskFull to raise for an error that `is_full`, raised in writing to `path`."""
    if isinstance(error, DiskFull):
        return error
    return DiskFull(path, needed, is_read_only=is_read_only(path) or os.strerror(errno.EROFS) in str(error))


def is_read_only(path: Path) -> bool:
    """True if a path, existing or not, is on a file system that is mounted read-only."""
    return bool(os.statvfs(existing(path)).f_flag & os.ST_RDONLY)


@contextlib.contextmanager
def naming_a_full_disk(path: Path) -> Iterator[None]:
    """Raise DiskFull with `path` if the block fails because a disk is full."""
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise disk_full(path, error) from error
        raise


@contextlib.contextmanager
def space_for(needed: int, path: Path) -> Iterator[None]:
    """Run a block that writes about `needed` bytes to the file or folder `path`, or raise DiskFull naming it.

    Free space is checked before the block, and again if it fails, since C++ libraries do not say why they failed. Bytes
    already at `path` count as written, since other ranks may have begun.
    """
    if is_read_only(path):
        raise DiskFull(path, is_read_only=True)
    if free_bytes(path) + size_of(path) < needed:
        raise DiskFull(path, needed)
    try:
        yield
    except Exception as error:
        if is_full(error) or is_read_only(path) or free_bytes(path) + size_of(path) < needed + SLACK:
            raise disk_full(path, error, needed) from error
        raise


def free_bytes(path: Path) -> int:
    """Return the bytes this user may still write on the disk of a path, existing or not."""
    return shutil.disk_usage(existing(path)).free


def existing(path: Path) -> Path:
    """Return the path, or the nearest folder above it that exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def size_of(path: Path) -> int:
    """Return the bytes of a file or of all files below a folder; 0 where nothing exists."""
    total = 0
    for file in path.rglob("*") if path.is_dir() else [path]:
        with contextlib.suppress(OSError):
            facts = file.lstat()
            total += 0 if stat.S_ISDIR(facts.st_mode) else facts.st_size
    return total


def write_atomically(path: Path, content: str | bytes, mode: int = 0o666) -> None:
    """Write a small file so that a reader sees the old one or the new one, never a part of it; raises DiskFull."""
    if not path.parent.is_dir():
        make_folder(path.parent)
    with naming_a_full_disk(path):
        files.write_atomically(path, content.encode() if isinstance(content, str) else content, mode)
        sync_to_disk(path.parent)


@contextlib.contextmanager
def appending(path: Path) -> Iterator[int]:
    """Open a file under ROOT to append to it during the block, and make it if it does not exist.

    Raises InputError if it is a link, or another user's link leads there: who else may write under ROOT could link to a
    file of this user.
    """
    files.check_links(path.parent)
    if path.is_symlink():
        raise InputError(f"{path}: is a link, through which nothing is written; replace it by a file")
    descriptor = os.open(path, os.O_CREAT | os.O_APPEND | os.O_RDWR | os.O_NOFOLLOW, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def check_inside(folder: Path, path: Path) -> None:
    """Raise InputError unless a path is inside a folder, also after all links: check it before the path is removed."""
    if not path.parent.resolve().is_relative_to(folder.resolve()):
        raise InputError(
            f"{path}: leads out of {folder} through a link, and nothing is removed there; replace the link by a folder"
        )


def append_line(descriptor: int, line: bytes, path: Path, *, durable: bool) -> None:
    """Append one line to a file opened with O_RDWR and O_APPEND, after ending a torn line, and flush it if `durable`.

    Raises DiskFull naming `path`, or another OSError; the file is then as it was before.
    """
    end = os.fstat(descriptor).st_size
    if end and os.pread(descriptor, 1, end - 1) != b"\n":
        line = b"\n" + line
    try:
        with naming_a_full_disk(path):
            left = memoryview(line)
            while left:
                left = left[os.write(descriptor, left) :]
            if durable:
                os.fsync(descriptor)
    except BaseException:
        with contextlib.suppress(OSError):  # the next line then ends the torn one
            os.ftruncate(descriptor, end)
        raise


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, and flush them so that a power failure removes none; raises DiskFull."""
    files.check_links(folder)
    _make_folder(folder)


def _make_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    with naming_a_full_disk(folder):
        folder.mkdir(exist_ok=True)
        sync_to_disk(folder.parent)


def sync_to_disk(path: Path) -> None:
    """Flush a file's contents or a folder's entries; until its folder is flushed, a new or renamed file is not safe."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # the file system cannot flush a folder
            raise
    finally:
        os.close(descriptor)


def drop_draft(path: Path) -> None:
    """Remove a half-written file if it exists and its disk is not read-only."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


T = TypeVar("T")
Result = TypeVar("Result")

DISK_THREADS = 8
"""Files flushed at once: eight take a seventh of the time they take one by one; more gain nothing."""


def side_by_side(visit: Callable[[T], Result], items: Iterable[T], threads: int) -> list[Result]:
    """Visit all items with a few threads and return the results in their order; an error stops further visits."""
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(visit, items))
