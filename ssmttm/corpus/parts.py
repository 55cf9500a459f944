"""Divide the tracks of a build among workers that share its folder, without a coordinator.

Each worker divides the tracks in the same way. It reads its own part and then every part that no living worker reads,
since a part may wait for its job or have lost its worker. The locks of parts are held by living workers alone. Which
worker reads a track makes no difference to the corpus.
"""

import heapq
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import NamedTuple, Self

from filelock import BaseFileLock, Timeout

from ssmttm.corpus.progress import POLL_SECONDS
from ssmttm.corpus.source import TrackRef
from ssmttm.files import write_atomically
from ssmttm.locks import file_lock, is_held

WAIT_SECONDS = 120.0
"""Longest time for which a worker without tracks to read waits for others that still read: it could help to write the
shards, but may hold a GPU meanwhile. The last worker does without it."""
_PCM, _LOSSLESS, _LOSSY = 176_400, 90_000, 24_000
_BYTES_A_SECOND = {".wav": _PCM, ".aiff": _PCM, ".aif": _PCM, ".flac": _LOSSLESS, ".mxl": 160, ".xml": 3_000}
"""Usual rates; the balance of the parts alone depends on them. Scores are measured on music21's Bach."""
_OPENING_SECONDS = 1.0
"""Music that could be read in the time in which a track is opened."""


class Share(NamedTuple):
    """The place of a worker: its part, from 0, of so many."""

    part: int = 0
    of: int = 1


def estimated_seconds(ref: TrackRef) -> float:
    """Return about how long a track lasts, by the size and the kind of its file; nothing is decoded."""
    rate = _BYTES_A_SECOND.get(ref.path.suffix.lower(), _LOSSY)
    try:
        return ref.path.stat().st_size / rate
    except OSError:  # its reader says so
        return 0.0


def divide(refs: Sequence[TrackRef], parts: int) -> list[list[TrackRef]]:
    """Divide tracks into parts of about equal length, each in the source's order.

    The longest pieces come first, each to the part that is shortest so far (Graham 1969, LPT: no part is longer than
    4/3 of the best division's longest). All tracks of a piece are in one part, since a score is parsed once for its
    versions.
    """
    seconds: dict[str, float] = {}
    for ref in refs:
        seconds[ref.piece] = seconds.get(ref.piece, 0.0) + estimated_seconds(ref) + _OPENING_SECONDS
    shortest = [(0.0, part) for part in range(parts)]
    place: dict[str, int] = {}
    for piece in sorted(seconds, key=lambda piece: (-seconds[piece], piece)):
        length, part = heapq.heappop(shortest)
        place[piece] = part
        heapq.heappush(shortest, (length + seconds[piece], part))
    divided: list[list[TrackRef]] = [[] for _ in range(parts)]
    for ref in refs:
        divided[place[ref.piece]].append(ref)
    return divided


class PartLocks:
    """The locks of a build's parts, and the marks of those that have been read, in the build's work folder."""

    def __init__(self, work: Path, of: int) -> None:
        self.folder, self.of = work / "parts", of
        self._held: dict[int, BaseFileLock] = {}

    def __enter__(self) -> Self:
        """Return the locks; those that are taken during the block are released at its end."""
        return self

    def __exit__(self, *_: object) -> None:
        for part in list(self._held):
            self.release(part)

    def are_others(self) -> bool:
        """True if a living worker holds a part of another division."""
        mine = {self._lock(part) for part in range(self.of)}
        return any(is_held(path) for path in self._locks() - mine)

    def are_alive(self) -> bool:
        """True if a living worker beside this one holds a part."""
        mine = {self._lock(part) for part in self._held}
        return any(is_held(path) for path in self._locks() - mine)

    def forget(self) -> None:
        """Count no part as read, while no other worker lives; what was read has its records."""
        for mark in self.folder.glob("*.read"):
            mark.unlink(missing_ok=True)

    def take(self, part: int) -> bool:
        """Lock a part, unless a living worker has it; True if this worker holds it."""
        if part not in self._held and (lock := lock_now(self._lock(part))) is not None:
            self._held[part] = lock
        return part in self._held

    def release(self, part: int) -> None:
        """Let other workers take a part."""
        self._held.pop(part).release()

    def is_read(self, part: int) -> bool:
        """True if a record of every track of a part was written."""
        return self._mark(part).exists()

    def mark(self, part: int) -> None:
        """Note that every track of a part has a record."""
        write_atomically(self._mark(part), b"")

    def unread(self, first: int) -> list[int]:
        """Return the parts that are not read, beginning with part `first`."""
        order = [(first + step) % self.of for step in range(self.of)]
        return [part for part in order if not self.is_read(part)]

    def read_all(self, share: Share, read: Callable[[int], None], pulse: Callable[[], None]) -> bool:
        """Read the worker's own part, and then every part that no living worker reads.

        Returns True when all parts are read, False if other workers still read after WAIT_SECONDS.
        """
        deadline: float | None = None
        while left := self.unread(share.part):
            part = next((part for part in left if self.take(part)), None)
            if part is not None:
                if not self.is_read(part):  # else another worker read it just now
                    read(part)
                    self.mark(part)
                if part != share.part:
                    self.release(part)
                deadline = None
                continue
            deadline = deadline or monotonic() + WAIT_SECONDS
            if monotonic() > deadline:
                return False
            pulse()
            sleep(POLL_SECONDS)
        return True

    def _locks(self) -> set[Path]:
        # Where the file system has no locks, those of living workers are leases beside these names.
        return {path.with_name(path.name.removesuffix(".lease")) for path in self.folder.glob("*.lock*")}

    def _lock(self, part: int) -> Path:
        return self.folder / f"{part}-of-{self.of}.lock"

    def _mark(self, part: int) -> Path:
        return self.folder / f"{part}-of-{self.of}.read"


def lock_now(path: Path) -> BaseFileLock | None:
    """Lock a file, unless a living worker holds it: then return None at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_held(path):  # taking a lease would wait for its holder
        return None
    lock = file_lock(path, wait=False)
    try:
        lock.acquire()
    except Timeout:
        return None
    return lock


@contextmanager
def in_turn(path: Path, pulse: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of a file during the block, calling `pulse` again and again while another worker holds it."""
    while (lock := lock_now(path)) is None:
        pulse()
        sleep(POLL_SECONDS)
    try:
        yield
    finally:
        lock.release()
