"""The bytes and lines of a table's file, whole or compressed, within limits.

Files may come from other people: sizes are checked before memory is taken.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from analysis.errors import InputError

MAX_ROWS = 200_000
"""Most rows of a table of points: a fit of so many takes a few minutes."""
MAX_COLUMNS = 10_000
MAX_BYTES, MAX_JSON_BYTES = 2**28, 2**26
"""Most bytes of a file, also after decompression, and of a JSON document, which is held whole in memory."""
MAX_CELL = 1000
"""Most characters of a cell."""
MAX_LINE = 2**20
"""Most characters of a line."""
NAMED = 20
"""Most columns that a message names."""
GZIP = b"\x1f\x8b"

Row = tuple[int, Sequence[object]]
Wanted = Callable[[str], bool]
"""Returns True for the name of a column that is kept."""


class Table(NamedTuple):
    """Names of all columns of a file, those of the columns kept, and numbered rows of the kept columns."""

    header: list[str]
    columns: list[str]
    rows: list[Row]
    comments: int = 0
    """Lines among the rows that begin with # and were passed over."""
    comma_is_decimal: bool = False
    """True if a comma in a number may stand for a point, since the cells are separated by semicolons."""


def listed(header: Sequence[str]) -> str:
    """Write the names of a table's columns, the first of very many."""
    more = f" and {len(header) - NAMED:,} more" if len(header) > NAMED else ""
    return f"{', '.join(name[:100] for name in header[:NAMED])}{more}" or "no columns"


def refuse_rows(count: int, source: object) -> None:
    """Raise InputError if a table has more than MAX_ROWS rows."""
    if count > MAX_ROWS:
        raise InputError(
            f"{source}: the table has more than {MAX_ROWS:,} rows; keep one row for each run, and of points taken "
            "mid-run a few for each."
        )


def refuse_columns(count: int, source: object) -> None:
    """Raise InputError if a table has more than MAX_COLUMNS columns."""
    if count > MAX_COLUMNS:
        raise InputError(
            f"{source}: the table has {count:,} columns, and at most {MAX_COLUMNS:,} are read; keep those of a table "
            "of points, one row for each run."
        )


def read_whole(path: Path, most: int, remedy: str) -> bytes:
    """Read a file whole, and decompress gzip.

    Raises OSError, and InputError with the remedy for more than `most` bytes, compressed or not.
    """
    size = path.stat().st_size
    if size > most:
        raise InputError(f"{path}: the file has {size:,} bytes, and at most {most:,} are read; {remedy}.")
    raw = path.read_bytes()
    if not raw.startswith(GZIP):
        return raw
    try:
        with gzip.open(path) as file:
            raw = file.read(most + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be decompressed ({error}); write the gzip file again.") from None
    if len(raw) > most:
        raise InputError(f"{path}: decompresses to more than {most:,} bytes, and no more are read; {remedy}.")
    return raw


def text_of(path: Path, most: int = MAX_BYTES) -> str:
    """Read a file of UTF-8 text, or of UTF-16 text with a byte order mark; raises InputError."""
    raw = read_whole(path, most, "keep one row for each run, or save the table as Parquet")
    utf16 = raw.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        return raw.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: byte {error.start} is not UTF-8; save the table as UTF-8 CSV or Parquet."
        ) from None


def lines_of(text: str, path: Path) -> Iterator[str]:
    """Yield the lines of a text with their ends; raises InputError for a line of more than MAX_LINE characters."""
    start, number = 0, 0
    while start < len(text):
        end = text.find("\n", start) + 1 or len(text)
        number += 1
        if end - start > MAX_LINE:
            raise InputError(
                f"{path}: line {number} has {end - start:,} characters, and at most {MAX_LINE:,} are read; write one "
                "row a line."
            )
        yield text[start:end]
        start = end
