"""The terminal of the command: results on standard output, everything else on standard error; Ctrl-C and SIGTERM."""

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

# A pipe has no width, so tables take what they need. Text from logs and files is printed as it is: neither :warning:
# nor [red] is markup.
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
    """Print a line on standard output unwrapped; only the terminal's edge breaks it."""
    console.print(line, soft_wrap=True)


def print_json(document: dict[str, Any]) -> None:
    """Print one JSON document, alone on standard output."""
    sys.stdout.write(json.dumps(document, indent=1, allow_nan=False) + "\n")


@contextmanager
def stoppable() -> Iterator[Callable[[], None]]:
    """End the block with KeyboardInterrupt on SIGTERM as on Ctrl-C; yield a function for the block to call repeatedly.

    Python loses an exception that a signal raises while an object is collected; the function raises it again.
    """
    is_stopped = False

    def stop(_number: int, _frame: FrameType | None) -> None:
        nonlocal is_stopped
        is_stopped = True
        raise KeyboardInterrupt

    def poll_stop() -> None:
        if is_stopped:
            raise KeyboardInterrupt

    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a script's background commands ignore Ctrl-C
        numbers.append(signal.SIGINT)
    before = [(number, signal.signal(number, stop)) for number in numbers]
    try:
        yield poll_stop
    finally:
        for number, handler in before:
            signal.signal(number, handler)


class Stopped(Exception):
    """The user stopped the command; the same command continues where it stopped."""
