"""Read rows of cells from CSV, Parquet and JSON files, each row with its number in the file."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from analysis.errors import InputError

Row = tuple[int, Sequence[object]]
Table = tuple[list[str], list[Row]]
Reader = Callable[[Path], Table]


def column_names(pairs: Sequence[str]) -> dict[str, str]:
    """Return the OURS=THEIRS pairs of --column as a mapping from this project's names; raises InputError."""
    names = {}
    for pair in pairs:
        ours, equals, theirs = pair.partition("=")
        if not equals or not ours or not theirs:
            raise InputError(f"--column {pair}: expected OURS=THEIRS, such as n_params=params.")
        names[ours] = theirs
    return names


def read_rows(path: Path, constants: Sequence[str] = ()) -> Table:
    """Return header and numbered rows of a file, read by its suffix; an empty file has an empty header.

    A constant "=TEXT" becomes a column of that name that holds TEXT in every row. Raises InputError with file and row.
    """
    header, rows = READERS.get(path.suffix.lower(), _csv)(path)
    added = [name for name in dict.fromkeys(constants) if name not in header]
    if not header or not added:
        return header, rows
    values = [name[1:] for name in added]
    return [*header, *added], [(number, [*cells, *values]) for number, cells in rows]


def _text(path: Path) -> str:
    raw = path.read_bytes()
    utf16 = raw.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        return raw.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: byte {error.start} is not UTF-8; save the table as UTF-8 CSV or Parquet."
        ) from None


def _csv(path: Path) -> Table:
    text = _text(path)
    if "\0" in text:
        raise InputError(
            f"{path}: contains NUL bytes, so it is not a CSV table; save it as UTF-8 CSV or Parquet."
        )
    first = text.lstrip().partition("\n")[0]
    separator = max(",;\t", key=first.count)
    reader = csv.reader(io.StringIO(text), delimiter=separator, skipinitialspace=True)
    header: list[str] = []
    rows: list[Row] = []
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if not header:
                header = [cell.strip() for cell in cells]
            elif len(cells) != len(header):
                raise InputError(
                    f"{path}: row {reader.line_num} has {len(cells)} cells where the header has {len(header)}"
                    + ("; write decimals with a point." if separator == "," else ".")
                )
            else:
                rows.append((reader.line_num, cells))
    except csv.Error as error:
        raise InputError(f"{path}: row {reader.line_num} cannot be read as CSV ({error}).") from None
    repeated = sorted({name for name in header if name and header.count(name) > 1})
    if repeated:
        raise InputError(f"{path}: the header has the column {repeated[0]} twice; keep one.")
    return header, rows


def _parquet(path: Path) -> Table:
    import pandas as pd

    try:
        table = pd.read_parquet(path)
    except Exception as error:  # pyarrow raises several unrelated errors for a broken file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: cannot be read as Parquet ({reason}).") from None
    rows = enumerate(table.itertuples(index=False, name=None), start=1)
    return [str(name) for name in table.columns], list(rows)


def _json(path: Path) -> Table:
    """Read one object a line, or one array of objects; a field that an object lacks becomes an empty cell."""
    text = _text(path)
    try:
        if path.suffix.lower() == ".json":
            found = list(enumerate(json.loads(text), 1))
        else:
            lines = enumerate(text.splitlines(), 1)
            found = [(number, json.loads(line)) for number, line in lines if line.strip()]
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error}).") from None
    for number, row in found:
        if not isinstance(row, dict):
            raise InputError(f"{path}: row {number} is not a JSON object; write one object for each run.")
    header = list(dict.fromkeys(str(name) for _, row in found for name in row))
    return header, [(number, [row.get(name) for name in header]) for number, row in found]


READERS: Mapping[str, Reader] = {
    **dict.fromkeys((".parquet", ".pq"), _parquet),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), _json),
}
