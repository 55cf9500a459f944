"""Tables of the terminal: text as wide as it needs to be, of ten thousand cells in a tenth of the time rich's take.

A terminal that is narrower wraps a printed table, and nothing is cut; a display that is drawn again and again crops it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.segment import Segment
from rich.style import Style

from harness.record.status import RunState

Cell = str | tuple[str, str | None]
"""Text, or text and a style such as `green`."""
GAP = "  "
COLOURS = {
    RunState.DONE: "green",
    RunState.RUNNING: "cyan",
    RunState.FAILED: "red",
    RunState.INTERRUPTED: "yellow",
    RunState.CANCELLED: "magenta",
}


class Table:
    """Rows of cells under a title and a line of names; columns in `numbers` are set to the right."""

    def __init__(self, title: str, columns: Sequence[str], numbers: Collection[str] = ()) -> None:
        self.title, self.columns = title, columns
        self._right = [name in numbers for name in columns]
        self._rows: list[tuple[Cell, ...]] = [tuple((name, "bold") for name in columns)]

    def add_row(self, *cells: Cell) -> None:
        """Add a row with a cell for each column."""
        self._rows.append(cells)

    def print(self, console: Console) -> None:
        """Print every row."""
        console.print(self, soft_wrap=True)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        """Yield the lines, neighbouring cells of one style as one segment."""
        yield Segment(self.title, Style(italic=True))
        yield Segment.line()
        texts = [
            [plain_text(cell if isinstance(cell, str) else cell[0]) for cell in row] for row in self._rows
        ]
        widths = [max(map(cell_len, column)) for column in zip(*texts, strict=True)]
        last = len(widths) - 1
        for row, words in zip(self._rows, texts, strict=True):
            plain = ""
            for index, (cell, text) in enumerate(zip(row, words, strict=True)):
                room = " " * (widths[index] - cell_len(text))
                before, after = (room, "") if self._right[index] else ("", room)
                after = "" if index == last else after + GAP
                style = None if isinstance(cell, str) else cell[1]
                if style is None:
                    plain += before + text + after
                    continue
                yield Segment(plain + before)
                yield Segment(text, console.get_style(style))
                plain = after
            yield Segment(plain + "\n")


def coloured(state: RunState) -> tuple[str, str | None]:
    """Return a state as a cell of a table."""
    return str(state), COLOURS.get(state)


def plain_text(text: str) -> str:
    """Return text that stays on its line: a reason may quote a log, and a log may move the terminal's cursor."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else " " for char in text)
