"""Rows of JSON files: an object a line, an array of objects, or columns; nested objects become dotted names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from analysis.errors import InputError
from analysis.points.files import (
    MAX_JSON_BYTES,
    Table,
    Wanted,
    lines_of,
    refuse_columns,
    refuse_rows,
    text_of,
)

DEEPEST = 8
"""Most levels of nesting that become dotted names."""


def read_lines(path: Path, wanted: Wanted) -> Table:
    """Return the wanted columns of a file with one JSON object a line; raises InputError."""
    return _table(path, _parsed_lines(path), wanted)


def read_document(path: Path, wanted: Wanted) -> Table:
    """Return the wanted columns of a JSON document: an array of objects, or an object of columns; raises InputError.

    The columns of an object are lists, or objects from a row's name to its value, as pandas writes them; an object of
    rows, of `columns` and `data`, and one that holds nothing but an array of objects are read too.
    """
    try:
        document = from_json(text_of(path, MAX_JSON_BYTES))
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: cannot be read as JSON ({error}).") from None
    if isinstance(document, dict):
        document = _rows_of(document, wanted, path)
    if not isinstance(document, list):
        raise InputError(f"{path}: cannot be read as JSON of a table; write an array of objects, one a run.")
    return _table(path, enumerate(document, 1), wanted)


def _parsed_lines(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines_of(text_of(path), path), 1):
        if line.strip():
            try:
                yield number, from_json(line)
            except ValueError as error:
                raise InputError(f"{path}: line {number} cannot be read as JSON ({error}).") from None


def _table(path: Path, rows: Iterator[tuple[int, Any]] | enumerate[Any], wanted: Wanted) -> Table:
    """Keep the wanted fields; a field that an object lacks becomes an empty cell."""
    header: dict[str, bool] = {}
    found: list[tuple[int, dict[str, Any]]] = []
    for number, row in rows:
        if not isinstance(row, dict):
            raise InputError(f"{path}: row {number} is not a JSON object; write one object for each run.")
        flat = dict(flattened(row))
        for name in flat:
            if name not in header:
                header[name] = wanted(name)
        refuse_columns(len(header), path)
        found.append((number, {name: cell for name, cell in flat.items() if header[name]}))
        refuse_rows(len(found), path)
    columns = [name for name, kept in header.items() if kept]
    return Table(
        list(header), columns, [(number, [row.get(name) for name in columns]) for number, row in found]
    )


def flattened(row: Mapping[str, Any], within: str = "", depth: int = 1) -> Iterator[tuple[str, Any]]:
    """Yield the fields of an object, those of nested objects under dotted names: config.n_params."""
    for name, value in row.items():
        if isinstance(value, dict) and value and depth < DEEPEST:
            yield from flattened(value, f"{within}{name}.", depth + 1)
        else:
            yield within + name, value


def _rows_of(document: dict[str, Any], wanted: Wanted, path: Path) -> list[Any]:
    """Return the rows of an object that holds a table by columns, by rows, or as an array within."""
    values = list(document.values())
    arrays = [value for value in values if isinstance(value, list)]
    if isinstance(document.get("columns"), list) and isinstance(document.get("data"), list):
        names, data = document["columns"], document["data"]
        if any(not isinstance(cells, list) or len(cells) != len(names) for cells in data):
            raise InputError(f"{path}: some row of `data` has not one cell for each of the `columns`.")
        return [dict(zip(map(str, names), cells, strict=True)) for cells in data]
    if len(arrays) == 1 and arrays[0] and all(isinstance(row, dict) for row in arrays[0]):
        return arrays[0]
    if values and all(isinstance(value, dict) for value in values) and not any(map(wanted, document)):
        # Rows by their names, or groups of columns, which are lists or have a row's name as their last part.
        leaves = [pair for value in values for pair in flattened(value)]
        if any(wanted(name) for name, _ in leaves) and not any(isinstance(cell, list) for _, cell in leaves):
            return values
    columns = dict(_columns(document))
    lists = {len(cells) for cells in columns.values() if isinstance(cells, list)}
    if not columns or len(lists) > 1:
        raise InputError(
            f"{path}: cannot be read as JSON of a table; write an array of objects, or columns of equal length."
        )
    keys: dict[str, None] = {str(k): None for k in range(max(lists, default=0))}
    for cells in columns.values():
        keys.update(dict.fromkeys(cells if isinstance(cells, dict) else ()))
    by_key = {
        name: cells if isinstance(cells, dict) else {str(k): cell for k, cell in enumerate(cells)}
        for name, cells in columns.items()
    }
    refuse_rows(len(keys), path)
    return [{name: cells.get(key) for name, cells in by_key.items()} for key in keys]


def _columns(document: Mapping[str, Any], within: str = "", depth: int = 1) -> Iterator[tuple[str, Any]]:
    """Yield the columns of an object: a list, or an object whose values are all single values."""
    for name, value in document.items():
        if isinstance(value, list):
            yield within + name, value
        elif isinstance(value, dict) and value:
            if not any(isinstance(cell, dict | list) for cell in value.values()):
                yield within + name, value
            elif depth < DEEPEST:
                yield from _columns(value, f"{within}{name}.", depth + 1)
