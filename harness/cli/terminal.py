"""Where the command speaks, results on standard output and all else on standard error, and how it is ended.

A table of text as wide as it needs to be: of ten thousand cells in a tenth of the time rich's own takes.

A terminal that is narrower wraps a printed sheet, and nothing is cut; a display that is drawn again and again crops it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.segment import Segment
from rich.style import Style

Cell = str | tuple[str, str | None]
"""Text, or text and a style such as `green`."""
GAP = "  "


class Sheet:
    """Rows of cells under a title and a line of names; columns in `numbers` are set to the right."""

    def __init__(self, title: str, columns: Sequence[str], numbers: Collection[str] = ()) -> None:
        self.title, self.columns = title, columns
        self._right = [name in numbers for name in columns]
        self._rows: list[tuple[Cell, ...]] = [tuple((name, "bold") for name in columns)]

    def add_row(self, *cells: Cell) -> None:
        """Add a row; it has a cell for each column."""
        self._rows.append(cells)

    def print(self, console: Console) -> None:
        """Print it whole."""
        console.print(self, soft_wrap=True)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        """The lines, cells of one style after the other as one piece."""
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


def plain_text(text: str) -> str:
    """Text that stays on its line: a reason may quote a log, and a log may hold what moves a terminal's cursor."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else " " for char in text)
