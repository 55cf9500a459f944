"""The end of a worker: exit statuses, out-of-memory errors, and a flag that signals set.

A signal handler must not save: a DeepSpeed save from one rank alone waits for the others for ever. The training loop
reads the flag between two steps, asks all ranks whether any received a signal, and then all save together.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from types import FrameType

from harness.common.disk import DiskFull
from ssmttm.errors import InputError

EXIT_NO_NODES = 69
"""EX_UNAVAILABLE: the Ray cluster has had no node for long; another cluster may have one."""
EXIT_NO_SPACE = 74
"""EX_IOERR: the disk is full; everything saved before is kept."""
EXIT_PREEMPTED = 75
"""EX_TEMPFAIL: stopped between two steps with everything saved, or another process trains the Series: start again."""
GPU_SHARE = "SSMSCALE_GPU_SHARE"
"""Environment variable: the share of a GPU that a rank may use; unset if it may use all of it."""
MOST_ATTEMPTS = 3
"""Starts of a Series whose worker disappears without an exit status before the Series counts as failed."""
STACK_SIGNAL = signal.SIGUSR1
"""Signal at which a worker writes the stack of each thread to standard error."""
STACK_SECONDS = 1.0
"""Time for that before a stalled worker is killed."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)

MEMORY_ERRORS = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA out of memory",
    "could not create a primitive",
)
"""Texts of torch's plain RuntimeErrors for lack of memory; the last is oneDNN's, which gives no reason."""


def is_out_of_memory(error: BaseException) -> bool:
    """True if an error reports a lack of memory, on the CPU or a GPU."""
    named = type(error).__name__ == "OutOfMemoryError"  # torch's, recognised without importing torch
    said = isinstance(error, RuntimeError) and any(text in str(error) for text in MEMORY_ERRORS)
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


class StopFlag:
    """The signal that asked this process to stop, if any."""

    reason: str | None = None
    """Name of the signal; None before any."""

    def install(self) -> None:
        """Handle SIGTERM, SIGINT and SIGUSR2 by setting `reason`."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name
