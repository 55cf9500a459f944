"""Run many small jobs on all cores, in one process or several, and stop without leaving any behind.

Workers are fresh processes (spawn), since forking one that has threads can hang. Each computes with one thread, so
that the bits of a result do not depend on how many workers there are. A worker whose parent is killed exits at once.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing.connection import wait as wait_for
from types import TracebackType
from typing import Any, Self, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_AHEAD = 4  # jobs handed out a worker before one must come back: bounds memory however many there are


class Pool:
    """Workers that all ran `setup(*arguments)` once; one worker is this very process."""

    def __init__(self, workers: int, setup: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        self.workers = workers
        self._setup = setup
        self._arguments = arguments
        self._executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        if self.workers > 1:
            self._executor = ProcessPoolExecutor(
                self.workers,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start_worker,
                initargs=(self._setup, self._arguments),
            )
        else:
            self._setup(*self._arguments)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)

    def run(self, job: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Results as they come, in no promised order; raises RuntimeError when a worker dies."""
        if self._executor is None:
            for item in items:
                with single_thread():
                    result = job(item)
                yield result
            return
        waiting = iter(items)
        running: set[Future[Result]] = set()
        try:
            while True:
                for item in islice(waiting, self.workers * _AHEAD - len(running)):
                    running.add(self._executor.submit(job, item))
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except BrokenProcessPool:
            raise RuntimeError(
                "a worker died, most likely for want of memory; what is finished is kept: build again with fewer "
                "workers"
            ) from None


@contextmanager
def single_thread() -> Iterator[None]:
    """Numerical libraries use one thread inside."""
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped, unused-ignore]

    torch = sys.modules.get("torch")  # keeps count of its threads itself
    before = torch.get_num_threads() if torch else 0
    with threadpool_limits(limits=1):
        if torch:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            if torch:
                torch.set_num_threads(before)


def _start_worker(setup: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    import numpy as np  # noqa: F401  # loads the BLAS that is to be limited
    from threadpoolctl import threadpool_limits

    threadpool_limits(limits=1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for torch, which is imported when a job needs it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops the work, and its workers with it
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    setup(*arguments)


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for([parent.sentinel])
        os._exit(1)
