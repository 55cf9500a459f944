"""The terminal of the command: results on standard output, everything else on standard error; Ctrl-C and SIGTERM."""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook
from rich.measure import Measurement
from rich.segment import Segment
from rich.text import Text

from harness.common.address import redact
from harness.common.streams import open_streams

STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""Characters that move the cursor, change the terminal or reverse the order of letters, in names others may choose."""


def without_steering(text: str) -> str:
    """Return text without the characters that steer a terminal; newlines and tabs stay."""
    return STEERING.sub("", text)


class _Printed:
    """Something to print, its text without passwords and characters that steer the terminal; its styles stay."""

    def __init__(self, printed: ConsoleRenderable) -> None:
        self._printed = printed

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for segment in console.render(self._printed, options):
            yield (
                segment if segment.control else Segment(redact(without_steering(segment.text)), segment.style)
            )

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement.get(console, options, self._printed)


class Harmless(RenderHook):
    """Removes from all that a console prints the characters that steer the terminal, and passwords of addresses."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """Return what is to be printed, each made harmless."""
        return [_Printed(printed) for printed in renderables]


open_streams()
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
for terminal in (console, errors):
    terminal.push_render_hook(Harmless())


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
