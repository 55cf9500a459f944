"""Read rows of cells from CSV, Parquet and JSON files, each row with its number in the file.

Files may come from other people: sizes are checked before memory is taken, and only the columns asked for are kept.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic_core import from_json

from analysis.errors import InputError

MAX_ROWS = 200_000
"""Most rows of a table of points: a fit of so many takes a few minutes."""
MAX_COLUMNS = 10_000
MAX_BYTES, MAX_JSON_BYTES = 2**28, 2**26
"""Most bytes of a file, and of a JSON document, which is held whole in memory."""
MAX_CELL = 1000
"""Most characters of a cell."""
MAX_LINE = 2**20
"""Most characters of a line."""
NAMED = 20
"""Most columns that a message names."""

Row = tuple[int, Sequence[object]]


class Table(NamedTuple):
    """Names of all columns of a file, those of the columns kept, and numbered rows of the kept columns."""

    header: list[str]
    columns: list[str]
    rows: list[Row]


Reader = Callable[[Path, Collection[str]], Table]


def column_names(pairs: Sequence[str]) -> dict[str, str]:
    """Return the OURS=THEIRS pairs of --column as a mapping from this project's names; raises InputError."""
    names = {}
    for pair in pairs:
        ours, equals, theirs = pair.partition("=")
        if not equals or not ours or not theirs:
            raise InputError(f"--column {pair}: expected OURS=THEIRS, such as n_params=params.")
        names[ours] = theirs
    return names


def read_rows(path: Path, wanted: Collection[str]) -> Table:
    """Return the `wanted` columns of a file, read by its suffix; an empty file has an empty header.

    A wanted "=TEXT" becomes a column of that name that holds TEXT in every row. Raises InputError with file and row,
    also for a file with more than MAX_ROWS rows, MAX_COLUMNS columns or MAX_BYTES bytes.
    """
    header, columns, rows = READERS.get(path.suffix.lower(), _csv)(path, wanted)
    added = [name for name in dict.fromkeys(wanted) if name.startswith("=") and name not in header]
    if not header or not added:
        return Table(header, columns, rows)
    values = [name[1:] for name in added]
    return Table(
        [*header, *added], [*columns, *added], [(number, [*cells, *values]) for number, cells in rows]
    )


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


def _refuse_columns(count: int, path: Path) -> None:
    if count > MAX_COLUMNS:
        raise InputError(
            f"{path}: the table has {count:,} columns, and at most {MAX_COLUMNS:,} are read; keep those of a table of "
            "points, one row for each run."
        )


def read_whole(path: Path, most: int, remedy: str) -> bytes:
    """Read a file whole; raises OSError, and InputError with the remedy for one of more than `most` bytes."""
    size = path.stat().st_size
    if size > most:
        raise InputError(f"{path}: the file has {size:,} bytes, and at most {most:,} are read; {remedy}.")
    return path.read_bytes()


def _refuse_texts(longest: int, name: str, path: Path) -> None:
    if longest > MAX_CELL:
        raise InputError(
            f"{path}: column {name} has a text of {longest:,} bytes, and at most {MAX_CELL:,} are read."
        )


def _text(path: Path, most: int = MAX_BYTES) -> str:
    raw = read_whole(path, most, "keep one row for each run, or save the table as Parquet")
    utf16 = raw.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        return raw.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: byte {error.start} is not UTF-8; save the table as UTF-8 CSV or Parquet."
        ) from None


def _lines(text: str, path: Path) -> Iterator[str]:
    """Yield the lines of a text with their ends."""
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


def _csv(path: Path, wanted: Collection[str]) -> Table:
    text = _text(path)
    if "\0" in text:
        raise InputError(
            f"{path}: contains NUL bytes, so it is not a CSV table; save it as UTF-8 CSV or Parquet."
        )
    first = text.lstrip().partition("\n")[0]
    separator = max(",;\t", key=first.count)
    _refuse_columns(1 + first.count(separator), path)
    reader = csv.reader(_lines(text, path), delimiter=separator, skipinitialspace=True)
    header: list[str] = []
    kept: list[int] = []
    rows: list[Row] = []
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if not header:
                header = [cell.strip() for cell in cells]
                kept = [j for j, name in enumerate(header) if name in wanted]
            elif len(cells) != len(header):
                raise InputError(
                    f"{path}: row {reader.line_num} has {len(cells)} cells where the header has {len(header)}"
                    + ("; write decimals with a point." if separator == "," else ".")
                )
            else:
                rows.append((reader.line_num, [cells[j] for j in kept]))
                refuse_rows(len(rows), path)
    except csv.Error as error:
        raise InputError(f"{path}: row {reader.line_num} cannot be read as CSV ({error}).") from None
    repeated = sorted(name for name, count in Counter(header).items() if name and count > 1)
    if repeated:
        raise InputError(f"{path}: the header has the column {repeated[0]} twice; keep one.")
    return Table(header, [header[j] for j in kept], rows)


def _parquet(path: Path, wanted: Collection[str]) -> Table:
    from pyarrow import compute, parquet, types

    try:
        facts = parquet.read_metadata(path)
        refuse_rows(facts.num_rows, path)
        _refuse_columns(facts.num_columns, path)
        header = [str(name) for name in parquet.read_schema(path).names]
        kept = [name for name in header if name in wanted]
        # A dictionary holds a long text that every row repeats once; pandas would hold it for each row.
        held = parquet.read_table(path, columns=kept, read_dictionary=kept)
        for name, column in zip(held.column_names, held.columns, strict=True):
            if types.is_dictionary(column.type):
                for chunk in column.chunks:
                    _refuse_texts(
                        compute.max(compute.binary_length(chunk.dictionary)).as_py() or 0, name, path
                    )
        table = held.to_pandas()
    except InputError:
        raise
    except Exception as error:  # pyarrow raises several unrelated errors for a broken file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: cannot be read as Parquet ({reason}).") from None
    rows = enumerate(table.itertuples(index=False, name=None), start=1)
    return Table(header, [str(name) for name in table.columns], list(rows))


def _json(path: Path, wanted: Collection[str]) -> Table:
    """Read one object a line, or one array of objects; a field that an object lacks becomes an empty cell."""
    header: dict[str, None] = {}
    found: list[tuple[int, dict[str, Any]]] = []
    for number, row in _json_rows(path):
        if not isinstance(row, dict):
            raise InputError(f"{path}: row {number} is not a JSON object; write one object for each run.")
        header.update(dict.fromkeys(row))
        found.append((number, {name: row[name] for name in wanted if name in row}))
        refuse_rows(len(found), path)
        _refuse_columns(len(header), path)
    columns = [name for name in header if name in wanted]
    return Table(
        list(header), columns, [(number, [row.get(name) for name in columns]) for number, row in found]
    )


def _json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        if path.suffix.lower() == ".json":
            yield from enumerate(from_json(_text(path, MAX_JSON_BYTES)), 1)
        else:
            for number, line in enumerate(_lines(_text(path), path), 1):
                if line.strip():
                    yield number, from_json(line)
    except InputError:
        raise
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error}).") from None


READERS: Mapping[str, Reader] = {
    **dict.fromkeys((".parquet", ".pq"), _parquet),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), _json),
}
