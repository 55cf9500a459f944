"""Tell whether the sound files of a corpus still hold what was built, without reading all of them again.

The worker that reads a file also hashes it. The hash is kept with the file's size and times: while these are as they
were, the file counts as unchanged; else it is hashed again, so that a copied or touched file is the same one and a
replaced file is another, whatever its size.
"""

import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from ssmttm.errors import InputError
from ssmttm.files import Frozen, read_lines, replacing, sha256_file

FILES = "files.jsonl"
_READERS = 8  # files looked at together: what a network disk answers late
_SETTLED_NS = (
    2 * 10**9
)  # the coarsest clock of a file system in use, FAT's; an earlier change may keep the time


class FileStamp(Frozen):
    """A file as it was when it was read."""

    size: int
    mtime_ns: int
    ctime_ns: int
    """Changes with any change of the file, also where a copy keeps the time of its original."""
    sha256: str

    def has_times_of(self, facts: os.stat_result) -> bool:
        """Return True if a file has this size and these times."""
        return (self.size, self.mtime_ns, self.ctime_ns) == (
            facts.st_size,
            facts.st_mtime_ns,
            facts.st_ctime_ns,
        )


class _Line(FileStamp):
    track: str


UNKNOWN = FileStamp(size=-1, mtime_ns=-1, ctime_ns=-1, sha256="")
"""A file that could not be read, or that changed meanwhile."""


def stamp(path: Path) -> FileStamp:
    """Hash a file; return UNKNOWN if it cannot be read."""
    try:
        facts = path.stat()
        sha256 = sha256_file(path)
    except OSError:
        return UNKNOWN
    trusted = time.time_ns() - max(facts.st_mtime_ns, facts.st_ctime_ns) > _SETTLED_NS
    return FileStamp(
        size=facts.st_size,
        mtime_ns=facts.st_mtime_ns if trusted else -1,  # the next look hashes the file again
        ctime_ns=facts.st_ctime_ns,
        sha256=sha256,
    )


def current(path: Path, before: FileStamp) -> FileStamp | None:
    """Return the stamp of a file that holds what it held `before`, or still cannot be read; None if it does not."""
    with suppress(OSError):
        facts = path.stat()
        if before.has_times_of(facts):
            return before
        if facts.st_size != before.size and before != UNKNOWN:
            return None
    now = stamp(path)
    return now if now.sha256 == before.sha256 else None


def write_files(corpus: Path, stamps: Iterable[tuple[str, FileStamp]]) -> None:
    """Write the record of the files, (path in the audio directory, stamp) each."""
    with replacing(corpus / FILES) as file:
        for track, one in stamps:
            line = _Line.model_validate(one.model_dump() | {"track": track})
            file.write((line.model_dump_json() + "\n").encode())


def changed_files(corpus: Path, audio: Path) -> list[str]:
    """Return the files that hold something else than when the corpus was built; none if it kept no record of them."""
    try:
        before = [_Line.model_validate_json(line) for line in read_lines(corpus / FILES)]
    except (OSError, ValidationError, InputError):
        return []
    with ThreadPoolExecutor(_READERS) as readers:
        now = list(readers.map(lambda one: current(audio / one.track, one), before))
    pairs = list(zip(before, now, strict=True))
    changed = [one.track for one, found in pairs if found is None]
    if not changed and any(found is not one and one.mtime_ns >= 0 for one, found in pairs):
        with suppress(OSError):  # the corpus may be on a disk that only others write
            write_files(corpus, [(one.track, found) for one, found in pairs if found])
    return changed
