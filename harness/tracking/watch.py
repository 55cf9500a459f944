"""Patience with a tracker: it has ten seconds for its first answer, and as long as it likes while it goes on answering.

Timeouts of drivers and of HTTP clients do not suffice: none covers a name server that is silent, a server that sends a
byte now and then, and a lock that another process keeps. So another thread does the work, and is left alone when the
tracker is silent for too long. It ends with the process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from threading import Lock, Thread
from typing import Any, TypeVar

T = TypeVar("T")

FIRST_SECONDS = 10.0
"""Time for a tracker's first answer."""
NEXT_SECONDS = 30.0
"""Time for each further answer: a busy server is slow with many metrics."""
FILE_SECONDS = 120.0
"""Time to take a file."""
TABLES_SECONDS = 300.0
"""Time to make or to check MLflow's tables, by this process or by another one that it waits for."""
FILE_CALLS = frozenset({"log_artifact", "log_text"})


class TrackerSilent(OSError):
    """A tracker does not answer."""


class Watch:
    """Knows how long a tracker has been asked without an answer; several threads may ask at once."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._asked: list[float] = []
        """Time allowed to each call that has not returned."""
        self._since = 0.0
        """When the first of them began, or another one returned."""
        self._has_answered = False
        self._answered = time.monotonic()
        self._is_given_up = False

    @contextmanager
    def waiting(self, seconds: float | None = None) -> Iterator[None]:
        """Count the block as one call, and its end as an answer; without `seconds` it is a request to MLflow.

        Raises TrackerSilent after `call` has given up, so that the thread left alone ends.
        """
        with self._lock:
            if self._is_given_up:
                raise TrackerSilent("given up")
            if not self._asked:
                self._since = time.monotonic()
            allowed = seconds or (NEXT_SECONDS if self._has_answered else FIRST_SECONDS)
            self._asked.append(allowed)
        try:
            yield
            self._has_answered |= seconds is None
            self._answered = time.monotonic()
        finally:
            with self._lock:
                self._asked.remove(allowed)
                self._since = time.monotonic()

    @property
    def is_silent(self) -> bool:
        """True if the tracker should have answered by now."""
        with self._lock:
            return bool(self._asked) and time.monotonic() - self._since > max(self._asked)

    @property
    def silence(self) -> float:
        """Seconds since the last call that did not fail, or since the watch began."""
        return time.monotonic() - self._answered

    def call(self, work: Callable[[], T]) -> T:
        """Return the result of `work`, done in another thread; raises TrackerSilent when the tracker is silent."""
        future = in_thread(work)
        while not wait([future], timeout=0.1).done:
            if self.is_silent:
                self._is_given_up = True
                raise TrackerSilent(f"no answer within {max(self._asked, default=0.0):.0f} s")
        return future.result()


class WatchedClient:
    """An MlflowClient each of whose calls is watched."""

    def __init__(self, client: Any, watch: Watch) -> None:
        self._client, self._watch = client, watch

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)

        def call(*arguments: Any, **named: Any) -> Any:
            with self._watch.waiting(FILE_SECONDS if name in FILE_CALLS else None):
                return method(*arguments, **named)

        return call


def in_thread(work: Callable[[], T]) -> Future[T]:
    """Begin `work` in a thread that does not keep the process alive, unlike those of concurrent.futures."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future
