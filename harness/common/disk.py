"""Writing on a disk that may fill up: files and lines are there whole or not at all, and a full disk has a name.

A killed process tears no line, since a line is one write. A disk without room does, and the next line must not be glued
to a torn one, so a failed line is taken back before anything else is written.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

from ssmttm import files

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})
"""Error numbers of a disk that is full, or of a user's full share of it."""

SHORT_WRITES = (
    "PytorchStreamWriter failed writing",
    "inline_container.cc",
    "basic_ios::clear: iostream error",
)
"""Words of torch's writer where the system took fewer bytes than it was given; it keeps no error number."""

SLACK = 2**20
"""Bytes a file system takes for itself beside those of files."""


class DiskFull(Exception):
    """A disk takes nothing more where something had to be written; the same command goes on once it does.

    It has no room left, or its file system was made read-only, as Linux does with one that has errors.
    """

    def __init__(self, path: Path | str, needed: int | None = None, *, is_read_only: bool = False) -> None:
        wanted = "" if needed is None else f" for {needed / 2**20:.1f} MiB"
        why = "its file system is read-only" if is_read_only else f"no room is left on its disk{wanted}"
        super().__init__(f"{path}: {why}")
        self.path, self.needed, self.is_read_only = Path(path), needed, is_read_only

    def __reduce__(self) -> tuple[Callable[..., DiskFull], tuple[Path, int | None]]:
        return partial(DiskFull, is_read_only=self.is_read_only), (self.path, self.needed)

    @property
    def remedy(self) -> str:
        """The remedy, as the beginning of a sentence."""
        return "make it writable" if self.is_read_only else "make some room"


def is_full(error: BaseException) -> bool:
    """True if an error, or one it came from, says that a disk takes no more; libraries say so in words of their own."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, DiskFull) or (
            isinstance(found, OSError) and found.errno in {*NO_ROOM, errno.EROFS}
        ):
            return True
        if any(words in str(found) for words in (*map(os.strerror, (*NO_ROOM, errno.EROFS)), *SHORT_WRITES)):
            return True
        found = found.__cause__ or found.__context__
    return False


def disk_full(path: Path, error: BaseException, needed: int | None = None) -> DiskFull:
    """Make the exception to raise for an error that `is_full` of something written to `path`."""
    if isinstance(error, DiskFull):
        return error
    return DiskFull(path, needed, is_read_only=is_read_only(path) or os.strerror(errno.EROFS) in str(error))


def is_read_only(path: Path) -> bool:
    """True if a path is, or would be, on a file system that is mounted read-only."""
    return bool(os.statvfs(existing(path)).f_flag & os.ST_RDONLY)


@contextlib.contextmanager
def naming_a_full_disk(path: Path) -> Iterator[None]:
    """Raise DiskFull with `path` where the block fails because a disk takes no more."""
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise disk_full(path, error) from error
        raise


@contextlib.contextmanager
def room_for(needed: int, path: Path) -> Iterator[None]:
    """Run a block that writes some `needed` bytes to the file or folder `path`, or raise DiskFull naming it.

    The free space is looked at before, and again where the block fails: libraries that write through C++ do not say why
    they failed, by then other processes may have made room, and free space tells nothing of a quota. What is there
    already counts as written, since other ranks may have begun.
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
    """Bytes this user may still write where a path is or would be."""
    return shutil.disk_usage(existing(path)).free


def existing(path: Path) -> Path:
    """Return the path, or the nearest folder above it that exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; of what is not there, none."""
    total = 0
    for file in path.rglob("*") if path.is_dir() else [path]:
        with contextlib.suppress(OSError):
            facts = file.lstat()
            total += 0 if stat.S_ISDIR(facts.st_mode) else facts.st_size
    return total


def write_atomically(path: Path, content: str | bytes, mode: int = 0o666) -> None:
    """Write a small file so that a reader sees the old one or the new one, never a part; raises DiskFull."""
    make_folder(path.parent)
    with naming_a_full_disk(path):
        files.write_atomically(path, content.encode() if isinstance(content, str) else content, mode)
        sync_folder(path.parent)


def append_line(descriptor: int, line: bytes, path: Path, *, durable: bool) -> None:
    """Append one line to a file opened with O_RDWR and O_APPEND, whole or not at all.

    A torn line at the end is ended first. `durable` sees the line to the disk. Raises DiskFull
    naming `path`, or the OSError of a disk that fails in another way; the file is then as it was before.
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
        with contextlib.suppress(OSError):  # then the next line ends the torn one
            os.ftruncate(descriptor, end)
        raise


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, so that they are there after a power failure too; raises DiskFull."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    with naming_a_full_disk(folder):
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """See to the disk which files a folder holds: a new or renamed file is not safe before that."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that has no such thing
            raise
    finally:
        os.close(descriptor)


def drop_draft(path: Path) -> None:
    """Remove a half-written file if it is there; a disk that is read-only by now keeps it."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def sync_file(path: Path) -> None:
    """See a finished file's contents to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


T = TypeVar("T")
Result = TypeVar("Result")

DISK_THREADS = 8
"""Files seen to a disk at once: eight take it a seventh of the time they take one by one, and more gain nothing."""


def side_by_side(visit: Callable[[T], Result], items: Iterable[T], threads: int) -> list[Result]:
    """Visit all with a few threads, results in the order of the items; after the first error no further one begins."""
    with ThreadPoolExecutor(threads) as pool:
        visits = [pool.submit(visit, item) for item in items]
        try:
            return [one.result() for one in visits]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
