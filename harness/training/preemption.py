"""A signal becomes a flag; the training loop reads it at a step boundary.

Nothing is saved inside a signal handler: a DeepSpeed save from one rank alone waits for the others for ever.
The loop asks all ranks whether any of them was told to stop, and then they save together.
"""

from __future__ import annotations

import ctypes
import signal
import sys
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


ANOTHER_RANKS_SIGNAL = "another rank's signal"
"""Why a rank stopped that was told nothing itself."""


class StopFlag:
    """Remembers that this process was asked to stop, and by what."""

    def __init__(self) -> None:
        self.reason: str | None = None

    def install(self) -> None:
        """Take over SIGTERM, SIGINT and SIGUSR2 from whoever had them."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name


def stop_when_parent_ends() -> None:
    """Ask the kernel for a SIGTERM when the process that started this one ends (Linux; elsewhere nothing).

    One that has ended already is not noticed: whoever must know compares parents.
    """
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, int(signal.SIGTERM), 0, 0, 0)
