"""Run many small jobs on all cores, in one process or several, and leave no process behind.

Workers are spawned, since forking a process with threads can hang. Each computes with one thread, so that the bits of
a result do not depend on the number of workers. A worker whose parent is killed exits at once.
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
from typing import Any, Self, TypeVar

from ssmttm.corpus.progress import PULSE_SECONDS

Item = TypeVar("Item")
Result = TypeVar("Result")

_AHEAD = 4  # jobs in flight for each worker, which bounds memory


class Pool:
    """Workers, each of which ran `setup(*arguments)` once; a single worker is the calling process."""

    def __init__(
        self,
        workers: int,
        setup: Callable[..., None],
        arguments: tuple[Any, ...],
        pulse: Callable[[], None] = lambda: None,
    ) -> None:
        """Start the workers. pulse: called about each second while this process waits for them."""
        self.workers, self._pulse = workers, pulse
        self._executor: ProcessPoolExecutor | None = None
        if workers > 1:
            self._executor = ProcessPoolExecutor(
                workers,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start_worker,
                initargs=(setup, arguments),
            )
        else:
            setup(*arguments)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)

    def run(self, job: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yield results in the order of completion; raises RuntimeError if a worker dies."""
        if self._executor is None:
            for item in items:
                with _single_thread():
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
                done, running = wait(running, PULSE_SECONDS, FIRST_COMPLETED)
                if not done:
                    self._pulse()
                for future in done:
                    yield future.result()
        except BrokenProcessPool:
            raise RuntimeError(
                "a worker died, most likely for lack of memory; finished tracks are kept: build again with fewer "
                "workers"
            ) from None


@contextmanager
def _single_thread() -> Iterator[None]:
    """Keep numerical libraries to one thread inside the block."""
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped, unused-ignore]

    torch = sys.modules.get("torch")  # has a thread count of its own
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
    import numpy as np  # noqa: F401  # loads the BLAS to be limited
    from threadpoolctl import threadpool_limits

    threadpool_limits(limits=1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for torch, which a job may import
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it and stops the workers
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    setup(*arguments)


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for([parent.sentinel])
        os._exit(1)
