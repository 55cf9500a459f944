"""Heartbeats: each rank writes what it is doing, and the process beside it notices when nothing moves any more.

A heartbeat is one line of JSON in ROOT/series/ID/logs/rank-N.heartbeat. A supervisor reads it on the rank's own node,
where a network file system shows it at once; `status` reads it anywhere, up to a minute late.

The ranks of a Series wait for each other, so one that stands still stops them all within a step; as long as any moves,
the others may be waiting for it. What a rank usually takes is measured in this very attempt: a step ten times slower
than those before it is slow, and not stalled.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, TypeVar

import psutil
from pydantic import TypeAdapter, ValidationError

from harness.common.disk import naming_a_full_disk

T = TypeVar("T")

FILE = "rank-{}.heartbeat"
LENGTH = 512
"""Bytes of a file; each line replaces the one before."""
WRITE_SECONDS = 0.2
"""Least time between two lines about the same activity."""
COUNT_SECONDS = 1.0
"""Time between two looks of `Heartbeat.counting`."""
FADING = 0.9
"""Share of the usual pause that is left after a step, a save or an evaluation without a pause."""
MULTIPLE = 20.0
"""Shortest stall, as a multiple of the usual pause between two moves."""
FIRST = 4.0
"""Shortest stall in an activity not finished before, as a multiple of the minimum: kernels are compiled in it."""
LONGEST_LOOK = 5.0
"""Longest time between two looks that counts: a supervisor may be suspended together with its ranks."""
IN_ITS_START = "in its start"
SHOWN_SECONDS = 60.0
"""Time without a move from which `status` mentions it."""


class Activity(StrEnum):
    """Kind of work of a rank."""

    START = "start"
    """It is started, loads a checkpoint, or prepares a Run."""
    STEP = "step"
    EVALUATION = "evaluation"
    SAVE = "save"


class Beat(NamedTuple):
    """The newest line of a heartbeat."""

    moves: int
    """Number of moves in this attempt."""
    t: float
    """Time of the newest move, seconds since 1970."""
    doing: Activity
    step: int
    usual: dict[Activity, float]
    """Longest pause between two moves of each activity, in seconds, where older ones fade; without unfinished ones."""

    @property
    def place(self) -> str:
        """Describe the activity and its step."""
        after = f"after step {self.step}"
        places = {Activity.STEP: f"in step {self.step}", Activity.START: IN_ITS_START}
        return places.get(self.doing, f"in the {self.doing} {after}")


_BEAT = TypeAdapter(Beat)


class Heartbeat(contextlib.AbstractContextManager["Heartbeat"]):
    """The heartbeat of this rank, open for writing."""

    def __init__(self, series_dir: Path, rank: int) -> None:
        path = beat_file(series_dir, rank)
        with naming_a_full_disk(path):
            self._descriptor = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_NOFOLLOW, 0o666)
        self._moves, self._doing, self._step = 0, Activity.START, 0
        self._usual: dict[Activity, float] = {}
        self._longest = 0.0
        """Longest pause since the activity or its step changed."""
        self._moved = self._write_from = time.monotonic()
        self.move(Activity.START, 0)

    def move(self, doing: Activity, step: int) -> None:
        """Note that the rank has moved and is now in an activity of a step."""
        now = time.monotonic()
        self._moves += 1
        self._longest = max(self._longest, now - self._moved)
        self._moved = now
        if doing is not self._doing or step != self._step:
            self._usual[self._doing] = max(self._longest, FADING * self._usual.get(self._doing, 0.0))
            self._longest = 0.0
            if doing is not self._doing:
                self._write_from = now
            self._doing, self._step = doing, step
        if now >= self._write_from:
            self._write_from = now + WRITE_SECONDS
            usual = {key: round(pause, 4) for key, pause in self._usual.items()}
            line = json.dumps(Beat(self._moves, round(time.time(), 3), doing, step, usual)._asdict())
            with contextlib.suppress(OSError):  # what writes more will find the disk full
                os.pwrite(self._descriptor, line.ljust(LENGTH - 1).encode() + b"\n", 0)

    def go_on(self) -> None:
        """Note that the rank has moved within its activity."""
        self.move(self._doing, self._step)

    def along(self, parts: Iterable[T]) -> Iterator[T]:
        """Yield the parts of a piece of work, each of which is a move."""
        for part in parts:
            self.go_on()
            yield part

    @contextlib.contextmanager
    def counting(self, measure: Callable[[], object]) -> Iterator[None]:
        """Take each change of a measure for a move during the block, which has no steps of its own to report."""
        over = threading.Event()

        def look() -> None:
            last: object = None
            while not over.wait(COUNT_SECONDS):
                with contextlib.suppress(OSError):  # files come and go
                    if measure() != last:
                        self.go_on()
                        last = measure()  # a move writes too

        thread = threading.Thread(target=look, name="heartbeat", daemon=True)
        with contextlib.suppress(RuntimeError):  # the system gives no thread: memory may be at its limit
            thread.start()
        try:
            yield
        finally:
            over.set()
            if thread.is_alive():
                thread.join()

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)


def written_bytes() -> int:
    """Return the bytes that this process has written; 0 where the system does not count them."""
    with contextlib.suppress(psutil.Error, AttributeError):  # macOS has no such counters
        return int(psutil.Process().io_counters().write_chars)
    return 0


def beat_file(series_dir: Path, rank: int) -> Path:
    """Return the path of a rank's heartbeat."""
    return series_dir / "logs" / FILE.format(rank)


def read_beat(path: Path) -> Beat | None:
    """Read a heartbeat; None if there is none, or while a line is being written."""
    try:
        return _BEAT.validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def read_beats(series_dir: Path) -> dict[str, Beat]:
    """Read the heartbeats of a Series by the names of their files, also those of earlier attempts."""
    paths = (series_dir / "logs").glob(FILE.format("*"))
    found = {path.name: read_beat(path) for path in paths}
    return {name: beat for name, beat in found.items() if beat is not None}


def describe_pause(series_dir: Path, job_seconds: float = math.inf) -> tuple[float, str] | None:
    """Return for how many seconds no rank of a Series has moved, and in words; None if that is no longer than usual.

    The first rank waits for all others. A beat of before its job started, `job_seconds` ago, is not the job's.
    """
    beat = read_beat(beat_file(series_dir, 0))
    pause = math.inf if beat is None else time.time() - beat.t
    if pause > job_seconds:
        beat, pause = None, job_seconds
    usual = 0.0 if beat is None else beat.usual.get(beat.doing, 0.0)
    if pause == math.inf or pause < max(SHOWN_SECONDS, 2 * usual):
        return None
    return pause // 1, f"nothing moved for {_whole(pause)} {beat.place if beat else IN_ITS_START}"


def _whole(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 60 else f"{seconds // 60:.0f} min"


class Watch:
    """Notices that the ranks of one task have stopped moving."""

    def __init__(self, minimum: float, earlier: Mapping[str, Beat] = MappingProxyType({})) -> None:
        """Begin to watch; no stall is shorter than `minimum` seconds, and `earlier` beats are of former attempts."""
        self._minimum, self._before = minimum, dict(earlier)
        self._seen: Hashable = None
        self._idle, self._looked = 0.0, time.monotonic()

    def look(self, beats: Mapping[str, Beat], *signs: Hashable) -> str | None:
        """Return the description of a stall; None as long as a beat or another sign of life changes in time."""
        now = time.monotonic()
        self._idle += min(now - self._looked, LONGEST_LOOK)
        self._looked = now
        own = [beat for name, beat in sorted(beats.items()) if beat != self._before.get(name)]
        seen = (*((beat.moves, beat.t) for beat in own), *signs)
        if seen != self._seen:
            self._seen, self._idle = seen, 0.0
        limit = max((self._limit(beat) for beat in own), default=FIRST * self._minimum)
        if self._idle < limit:
            return None
        place = max(own, key=lambda beat: beat.t).place if own else IN_ITS_START
        return f"nothing moved for {_whole(self._idle)} {place}"

    def _limit(self, beat: Beat) -> float:
        if beat.doing not in beat.usual:
            return FIRST * self._minimum
        return max(self._minimum, MULTIPLE * beat.usual[beat.doing])
