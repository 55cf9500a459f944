"""The terminal of the command: results on standard output, all else on standard error, and how a user stops it."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rich.console import Console
from rich.text import Text

# A pipe has no width of its own; tables are then as wide as they need to be.
# What a log or a file says stays as it is: :warning: is no picture, and [red] no colour.
console = Console(
    highlight=False,
    emoji=False,
    markup=False,
    width=None if sys.stdout.isatty() else 250,
    soft_wrap=not sys.stdout.isatty(),
)
errors = Console(stderr=True, highlight=False, emoji=False, markup=False, soft_wrap=True)


def warn(*notes: str) -> None:
    """Print warnings on standard error, a line each."""
    for note in notes:
        errors.print(f"warning: {note}")


def print_line(line: str | Text) -> None:
    """Print a line on standard output as it is; a terminal that is narrower breaks it at its edge, not at a word."""
    console.print(line, soft_wrap=True)


def print_json(document: dict[str, Any]) -> None:
    """Print one JSON document, alone on standard output."""
    sys.stdout.write(json.dumps(document, indent=1, allow_nan=False) + "\n")


@contextmanager
def stoppable() -> Iterator[Callable[[], None]]:
    """End the block on SIGTERM as on Ctrl-C, by KeyboardInterrupt; yield a function that the block calls now and then.

    An exception that a signal raises is lost where Python is collecting an object; the function raises it again.
    """
    received: list[int] = []

    def stop(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt

    def poll_stop() -> None:
        if received:
            raise KeyboardInterrupt

    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in the background of a script
        numbers.append(signal.SIGINT)
    before = [(number, signal.signal(number, stop)) for number in numbers]
    try:
        yield poll_stop
    finally:
        for number, handler in before:
            signal.signal(number, handler)


class Stopped(Exception):
    """The user ended a submission; the same command goes on from there."""
