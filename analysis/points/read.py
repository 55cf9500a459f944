"""Read rows of cells from CSV, Parquet and JSON files, each row with its number in the file.

Only the columns asked for are kept, and no file takes more memory than its limits allow.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from analysis.errors import InputError
from analysis.points.delimited import read_csv
from analysis.points.documents import read_document, read_lines
from analysis.points.files import MAX_CELL, Table, Wanted, refuse_columns, refuse_rows
from analysis.points.units import unit_named

FILE = "@file"
"""Stands for the name of the file, without its endings, in every row."""

Reader = Callable[[Path, Wanted], Table]


def column_names(pairs: Sequence[str]) -> dict[str, str]:
    """Return the OURS=THEIRS pairs of --column as a mapping from this project's names; raises InputError."""
    return dict(_pair(pair, "--column", "OURS=THEIRS, such as n_params=params") for pair in pairs)


def column_units(pairs: Sequence[str]) -> dict[str, float]:
    """Return the COLUMN=UNIT pairs of --unit as factors by this project's names; raises InputError."""
    named = (_pair(pair, "--unit", "COLUMN=UNIT, such as n_params=B") for pair in pairs)
    return {name: unit_named(unit, f"--unit {name}={unit}") for name, unit in named}


def _pair(pair: str, option: str, expected: str) -> tuple[str, str]:
    ours, equals, theirs = pair.partition("=")
    if not equals or not ours or not theirs:
        raise InputError(f"{option} {pair}: expected {expected}.")
    return ours, theirs


def read_rows(path: Path, wanted: Wanted, added: Collection[str] = ()) -> Table:
    """Return the wanted columns of a file, read by its suffix; an empty file has an empty header.

    An added "=TEXT" becomes a column of that name that holds TEXT in every row, and FILE one with the file's name.
    Raises InputError with file and row, also for a file with more than MAX_ROWS rows, MAX_COLUMNS columns or MAX_BYTES
    bytes.
    """
    endings = [ending.lower() for ending in path.suffixes if ending.lower() != ".gz"]
    table = READERS.get(endings[-1] if endings else "", read_csv)(path, wanted)
    new = [name for name in dict.fromkeys(added) if name not in table.header]
    if not table.header or not new:
        return table
    stem = path.name.removesuffix("".join(path.suffixes)) or path.name
    values = [stem if name == FILE else name[1:] for name in new]
    return table._replace(
        header=[*table.header, *new],
        columns=[*table.columns, *new],
        rows=[(number, [*cells, *values]) for number, cells in table.rows],
    )


def _parquet(path: Path, wanted: Wanted) -> Table:
    from pyarrow import compute, parquet, types

    try:
        facts = parquet.read_metadata(path)
        refuse_rows(facts.num_rows, path)
        refuse_columns(facts.num_columns, path)
        header = [str(name) for name in parquet.read_schema(path).names]
        kept = [name for name in header if wanted(name)]
        # A dictionary holds a long text that every row repeats once; pandas would hold it for each row.
        held = parquet.read_table(path, columns=kept, read_dictionary=kept)
        for name, column in zip(held.column_names, held.columns, strict=True):
            if types.is_dictionary(column.type):
                for chunk in column.chunks:
                    _refuse_texts(
                        compute.max(compute.binary_length(chunk.dictionary)).as_py() or 0, name, path
                    )
        table = held.to_pandas(ignore_metadata=True)  # by which an index that has a name is a column
    except InputError:
        raise
    except Exception as error:  # pyarrow raises several unrelated errors for a broken file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: cannot be read as Parquet ({reason}).") from None
    rows = enumerate(table.itertuples(index=False, name=None), start=1)
    return Table(header, [str(name) for name in table.columns], list(rows))


def _refuse_texts(longest: int, name: str, path: Path) -> None:
    if longest > MAX_CELL:
        raise InputError(
            f"{path}: column {name} has a text of {longest:,} bytes, and at most {MAX_CELL:,} are read."
        )


READERS: Mapping[str, Reader] = {
    **dict.fromkeys((".parquet", ".pq"), _parquet),
    **dict.fromkeys((".jsonl", ".ndjson"), read_lines),
    ".json": read_document,
}
