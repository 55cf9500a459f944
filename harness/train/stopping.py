"""The end of a worker: exit statuses, out-of-memory errors, and a flag that signals set.

A signal handler must not save: a DeepSpeed save from one rank alone waits for the others for ever. The training loop
reads the flag between two steps, asks all ranks whether any received a signal, and then all save together.
"""

from __future__ import annotations

import errno
import logging
import re
import signal
from collections.abc import Callable
from types import FrameType

from harness.common.disk import DiskFull
from harness.record.nodes import NodeFailure
from ssmttm.errors import InputError

EXIT_NO_NODES = 69
"""EX_UNAVAILABLE: the Ray cluster has had no node for long; another cluster may have one."""
EXIT_OUT_OF_MEMORY = 71
"""EX_OSERR: stands for the end of a worker that the system killed for memory."""
EXIT_BAD_NODE = 72
"""EX_OSFILE: this node has failed, and not the Run; another node may train it."""
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

MEMORY_ERRORS = re.compile(
    r"""
    CUDA\ out\ of\ memory                                   # torch's allocator, in a plain RuntimeError
    | CUDA(\ driver)?\ error:\ out\ of\ memory               # AcceleratorError, at whichever call comes next
    | Triton\ Error\ \[CUDA\]:\ out\ of\ memory               # a kernel that is loaded
    | CUDA_ERROR_OUT_OF_MEMORY | cudaErrorMemoryAllocation
    | CU(BLAS|DNN|SOLVER|SPARSE|RAND)_STATUS_(?:\w+_)?ALLOC(?:ATION)?_FAILED | CUFFT_ALLOC_FAILED
    | Cuda\ failure\ (?:2\ )?'out\ of\ memory'                # NCCL's last error, and its own word for it
    | Failed\ to\ CUDA\ (?:host\ )?[mc]?alloc
    | NVML_SUCCESS\ ==\ .*CUDACachingAllocator              # the allocator, where NVML cannot name the free memory
    | DefaultCPUAllocator:\ (?:can't\ allocate|not\ enough)\ memory
    | std::bad_alloc | unable\ to\ mmap\ .*Cannot\ allocate\ memory
    | could\ not\ create\ a\ primitive                      # oneDNN, which gives no reason
    """,
    re.VERBOSE,
)
"""Texts of plain RuntimeErrors for lack of memory. Triton's OutOfResources is none: a kernel that needs more shared
memory than a GPU has needs it at every batch size.
"""


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an error, or one that it names as its cause, reports a lack of memory on the host or a GPU."""
    # torch's own class is recognised by its name, without importing torch.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, RuntimeError) and MEMORY_ERRORS.search(str(error)):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    return error.__cause__ is not None and is_out_of_memory(error.__cause__)


def exit_status(run: Callable[[], int], log: logging.Logger) -> int:
    """Return the exit status that `run` returns, or with which it exits.

    Log wrong input, a bad node and a full disk, and return 2, 72 or 74 for them.
    """
    try:
        return run()
    except SystemExit as error:
        # Of one rank among several: it ends at once, before it frees what the others wait for.
        return error.code if isinstance(error.code, int) else 1
    except InputError as error:
        log.error("%s", error)
        return 2
    except NodeFailure as error:
        log.error("%s", error)
        return EXIT_BAD_NODE
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
