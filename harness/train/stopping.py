"""How a worker stops: its exit statuses, errors that say memory is short, and a flag that signals set.

Nothing is saved inside a signal handler: a DeepSpeed save from one rank alone waits for the others for ever. The
training loop reads the flag at a step boundary, asks all ranks whether any of them was told to stop, and they save
together.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from types import FrameType

from harness.common.disk import DiskFull
from ssmttm.errors import InputError

EXIT_NO_NODES = 69
"""EX_UNAVAILABLE: the exit status of what trains on a Ray that has had no node for long; another Ray may have."""
EXIT_NO_SPACE = 74
"""EX_IOERR: a worker's exit status where no room is left on the disk; everything saved before is kept."""
EXIT_PREEMPTED = 75
"""EX_TEMPFAIL: stopped at a step boundary with everything saved, or busy elsewhere: to be started again."""
GPU_SHARE = "SSMSCALE_GPU_SHARE"
"""Variable with the share of a GPU that a rank has; not set where it has all of it."""
MOST_ATTEMPTS = 3
"""Times a Series whose worker goes away without a word is started again before it counts as failed."""


WORDS = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA out of memory",
    "could not create a primitive",
)
"""What torch says in plain RuntimeErrors where memory is short; the last is oneDNN's, which gives no reason."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is short, on whatever device."""
    named = type(error).__name__ == "OutOfMemoryError"  # torch's, without importing torch to ask
    said = isinstance(error, RuntimeError) and any(words in str(error) for words in WORDS)
    return isinstance(error, MemoryError) or named or said


def exit_status(run: Callable[[], int], log: logging.Logger) -> int:
    """Return the exit status that `run` returns; log wrong input and a full disk, and return 2 or 74 for them."""
    try:
        return run()
    except InputError as error:
        log.error("%s", error)
        return 2
    except DiskFull as error:
        log.error("%s; %s", error, error.remedy)
        return EXIT_NO_SPACE


STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class StopFlag:
    """Remembers that this process was asked to stop, and by what."""

    reason: str | None = None
    """Name of the signal that asked it to stop; None where none has."""

    def install(self) -> None:
        """Take over SIGTERM, SIGINT and SIGUSR2 from whoever had them."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name
