"""Tables of the terminal: text of ten thousand cells in a tenth of the time that rich's tables take.

A pipe gets each row on one line. In a narrower terminal rich folds the texts of a table; where the numbers alone are
too wide, the terminal wraps the lines. Nothing is cut, except by a display that is drawn again and again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.segment import Segment
from rich.style import Style
from rich.text import Text

from harness.record.status import RunState

Cell = str | tuple[str, str | None]
"""Text, or text and a style such as `green`."""
GAP = "  "
NARROWEST = 8
"""Characters to which a column of text may be folded."""
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
        self.title = title
        self._right = [name in numbers for name in columns]
        self._rows: list[list[tuple[str, str | None]]] = []
        self.add_row(*((name, "bold") for name in columns))

    def add_row(self, *cells: Cell) -> None:
        """Add a row with a cell for each column."""
        styled = ((cell, None) if isinstance(cell, str) else cell for cell in cells)
        self._rows.append([(plain_text(text), style) for text, style in styled])

    def print(self, console: Console) -> None:
        """Print every row."""
        widths = self._widths()
        least = [
            width if right else min(width, NARROWEST)
            for width, right in zip(widths, self._right, strict=True)
        ]
        gaps = len(GAP) * (len(widths) - 1)
        if console.is_terminal and sum(least) + gaps <= console.width < sum(widths) + gaps:
            self._print_folded(console)
        else:
            console.print(self, soft_wrap=True)

    def _print_folded(self, console: Console) -> None:
        from rich.table import Table as RichTable

        folded = RichTable(box=None, pad_edge=False, padding=(0, len(GAP), 0, 0), show_header=False)
        for right in self._right:
            folded.add_column(justify="right" if right else "left", no_wrap=right, overflow="fold")
        for row in self._rows:
            folded.add_row(*(Text(text, style or "") for text, style in row))
        console.print(Text(self.title, style="italic"))
        console.print(folded)

    def _widths(self) -> list[int]:
        return [max(cell_len(text) for text, _ in column) for column in zip(*self._rows, strict=True)]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        """Yield the lines, neighbouring cells of one style as one segment."""
        yield Segment(self.title, Style(italic=True))
        yield Segment.line()
        widths = self._widths()
        last = len(widths) - 1
        for row in self._rows:
            plain = ""
            for index, (text, style) in enumerate(row):
                space = " " * (widths[index] - cell_len(text))
                before, after = (space, "") if self._right[index] else ("", space)
                after = "" if index == last else after + GAP
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


def listed(counts: Mapping[str, int]) -> str:
    """Return how many runs are in each state: 3 done, 1 failed."""
    return ", ".join(f"{count:,} {state}" for state, count in counts.items())


def plain_text(text: str) -> str:
    """Return text that stays on its line: a reason may quote a log, and a log may move the terminal's cursor."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else " " for char in text)
