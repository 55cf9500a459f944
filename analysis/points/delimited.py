"""Rows of CSV files: any of the usual separators, comment lines, and the line `sep=;` that spreadsheets write."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from analysis.errors import InputError
from analysis.points.files import Row, Table, Wanted, lines_of, refuse_columns, refuse_rows, text_of

SEPARATORS = ",;\t"
DECLARED = re.compile(r"\s*\"?sep=(.)\"?\s*", re.IGNORECASE)


class _Lines:
    """The lines of a CSV file without comments and without the line that declares the separator.

    `number` is that of the line in the file; csv.reader counts only the lines that it is given. `heading` is the text
    of the last comment above the rows.
    """

    def __init__(self, text: str, path: Path) -> None:
        self.number = 0
        self.comments = 0
        self.heading = ""
        self.rows_begun = False
        self.separator = ""
        self._lines = lines_of(text, path)
        self._in_quotes = False
        self._first = next(self._meant(), "")
        if not self.separator:
            self.separator = max(SEPARATORS, key=self._first.count)

    @property
    def first(self) -> str:
        """The header's line."""
        return self._first

    def __iter__(self) -> Iterator[str]:
        if self._first:
            yield self._first
        yield from self._meant()

    def _meant(self) -> Iterator[str]:
        for line in self._lines:
            self.number += 1
            if not self._in_quotes:
                start = line.lstrip()
                if not self.rows_begun and (not start or (declared := DECLARED.fullmatch(line))):
                    self.separator = declared[1] if start and declared else self.separator
                    continue
                if start.startswith("#"):
                    self.comments += self.rows_begun
                    self.heading = self.heading if self.rows_begun else start.lstrip("# ").rstrip("\r\n")
                    continue
                self.rows_begun = True
            self._in_quotes ^= bool(line.count('"') % 2)
            yield line


def _commented_header(lines: _Lines, wanted: Wanted) -> list[str]:
    """Return the names of a header that is a comment, as numpy.savetxt writes it; none if the first row has names."""
    first, heading = (
        [cell.strip().strip('"') for cell in text.split(lines.separator)]
        for text in (lines.first, lines.heading)
    )
    return heading if any(map(wanted, heading)) and not any(map(wanted, first)) else []


def read_csv(path: Path, wanted: Wanted) -> Table:
    """Return the wanted columns of a CSV file, rows numbered by the line they end on; raises InputError."""
    text = text_of(path)
    if "\0" in text:
        raise InputError(
            f"{path}: contains NUL bytes, so it is not a CSV table; save it as UTF-8 CSV or Parquet."
        )
    lines = _Lines(text, path)
    refuse_columns(1 + lines.first.count(lines.separator), path)
    reader = csv.reader(lines, delimiter=lines.separator, skipinitialspace=True)
    header = _commented_header(lines, wanted)
    kept = [j for j, name in enumerate(header) if wanted(name)]
    rows: list[Row] = []
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if not header:
                header = [cell.strip() for cell in cells]
                kept = [j for j, name in enumerate(header) if wanted(name)]
            elif len(cells) != len(header):
                raise InputError(
                    f"{path}: row {lines.number} has {len(cells)} cells where the header has {len(header)}"
                    + ("; write decimals with a point." if lines.separator == "," else ".")
                )
            else:
                rows.append((lines.number, [cells[j] for j in kept]))
                refuse_rows(len(rows), path)
    except csv.Error as error:
        raise InputError(f"{path}: row {lines.number} cannot be read as CSV ({error}).") from None
    repeated = sorted(name for name, count in Counter(header).items() if name and count > 1)
    if repeated:
        raise InputError(f"{path}: the header has the column {repeated[0]} twice; keep one.")
    return Table(header, [header[j] for j in kept], rows, lines.comments, lines.separator == ";")
