"""Where the command speaks, results on standard output and all else on standard error, and how it is ended."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rich.console import Console

# A pipe has no width of its own; tables are then as wide as they need to be.
# What a log says stays as it is: :warning: is no picture.
console = Console(
    highlight=False,
    emoji=False,
    width=None if sys.stdout.isatty() else 250,
    soft_wrap=not sys.stdout.isatty(),
)
errors = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)


def counted(number: int, noun: str) -> str:
    """1 run, 2 runs; 1 series, 2 series."""
    return f"{number} {noun}" if number == 1 or noun.endswith("s") else f"{number} {noun}s"


def warn(*notes: str) -> None:
    """Say on standard error what a user should know, a line each."""
    for note in notes:
        errors.print(f"warning: {note}", markup=False)


def print_json(document: dict[str, Any]) -> None:
    """Print one JSON document, alone on standard output."""
    sys.stdout.write(json.dumps(document, indent=1, allow_nan=False) + "\n")


@contextmanager
def stoppable() -> Iterator[Callable[[], None]]:
    """SIGTERM ends the block as Ctrl-C does, in order: by KeyboardInterrupt.

    What it gives is to be called now and then. An exception that a signal raises is lost where Python happens to be
    collecting an object, and then it is raised once more.
    """
    told: list[int] = []

    def stop(number: int, _frame: FrameType | None) -> None:
        told.append(number)
        raise KeyboardInterrupt

    def heed() -> None:
        if told:
            raise KeyboardInterrupt

    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in the background of a script
        numbers.append(signal.SIGINT)
    before = [(number, signal.signal(number, stop)) for number in numbers]
    try:
        yield heed
    finally:
        for number, handler in before:
            signal.signal(number, handler)
