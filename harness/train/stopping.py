"""A signal, or a word in a file, becomes a flag; the training loop reads it at a step boundary.

Nothing is saved inside a signal handler: a DeepSpeed save from one rank alone waits for the others for ever.
The loop asks all ranks whether any of them was told to stop, and then they save together.
"""

from __future__ import annotations

import contextlib
import signal
import time
from pathlib import Path
from types import FrameType

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


STOPPED = "out of memory"
"""What the reason of a journal's preempted event begins with, where a Series goes on with a smaller micro-batch."""
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
