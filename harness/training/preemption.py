"""A signal, or a word in a file, becomes a flag; the training loop reads it at a step boundary.

Nothing is saved inside a signal handler: a DeepSpeed save from one rank alone waits for the others for ever.
The loop asks all ranks whether any of them was told to stop, and then they save together.
"""

from __future__ import annotations

import contextlib
import ctypes
import signal
import sys
import time
from pathlib import Path
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


ANOTHER_RANKS_SIGNAL = "another rank's signal"
"""Why a rank stopped that was told nothing itself."""


LOOK_SECONDS = 1.0
"""How often a file is looked into that may ask to stop."""


class StopFlag:
    """Remembers that this process was asked to stop, and by what."""

    def __init__(self) -> None:
        self._reason: str | None = None

    @property
    def reason(self) -> str | None:
        """What asked it to stop; None where nothing has."""
        return self._reason

    def install(self) -> None:
        """Take over SIGTERM, SIGINT and SIGUSR2 from whoever had them."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self._reason = signal.Signals(number).name


class StopFile(StopFlag):
    """A flag that is raised by writing a word into a file, for where no signal handler can be installed.

    The file is there from the start and is read: over a network file system, one that appears is seen much later. The
    word goes over blanks, since on a full disk there is room for nothing else.
    """

    BLANK = " " * 16

    @classmethod
    def make(cls, file: Path) -> None:
        """Write the file before anybody is to look into it."""
        file.write_text(cls.BLANK, encoding="utf-8")

    @staticmethod
    def ask(file: Path, word: str) -> None:
        """Ask whoever looks into the file to stop; the word has at most as many letters as there are blanks."""
        with file.open("r+", encoding="utf-8") as blanks:
            blanks.write(word)

    def __init__(self, file: Path) -> None:
        super().__init__()
        self._file, self._look_again = file, 0.0

    @property
    def reason(self) -> str | None:
        """The word in the file, which is looked for once a second at most."""
        if self._reason is None and (now := time.monotonic()) >= self._look_again:
            self._look_again = now + LOOK_SECONDS
            with contextlib.suppress(OSError):  # a file system that is away for a moment asks nobody to stop
                self._reason = self._file.read_text(encoding="utf-8").strip() or None
        return self._reason


def stop_when_parent_ends() -> None:
    """Ask the kernel for a SIGTERM when the process that started this one ends (Linux; elsewhere nothing).

    One that has ended already is not noticed: whoever must know compares parents.
    """
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, int(signal.SIGTERM), 0, 0, 0)
