"""Conditions on the rows of a table, such as optimizer=adamw or lr<=0.001, parsed and never evaluated as code."""

from __future__ import annotations

import math
import operator
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from analysis.errors import InputError
from analysis.points.files import Table, listed
from analysis.points.units import number_of

WRITTEN = re.compile(r"\s*(.+?)\s*(<=|>=|!=|==|=|<|>)\s*(.*?)\s*")
ORDER: Mapping[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
SHOWN = 8


@dataclass(frozen=True)
class Condition:
    """A column, a sign and a value, as the user wrote them."""

    column: str
    sign: str
    value: str

    @property
    def text(self) -> str:
        """The condition as it is typed."""
        return f"{self.column}{self.sign}{self.value}"

    def holds(self, cell: object) -> bool:
        """Return True if a cell fulfils it; raises ValueError if it compares the size of a text."""
        text = plain(cell)
        if self.sign in ORDER:
            return bool(text) and ORDER[self.sign](number_of(text), number_of(self.value))
        return same(text, self.value) == (self.sign != "!=")


def plain(cell: object) -> str:
    """Return a cell's text: empty for none and NaN, true and false in small letters."""
    text = "" if cell is None or (isinstance(cell, float) and math.isnan(cell)) else str(cell).strip()
    return text.lower() if text.lower() in {"true", "false", "nan"} else text


def same(one: str, other: str) -> bool:
    """Return True if two texts are one, or are the same number: 3e-4 and 0.0003."""
    if one == other or plain(other) == one:
        return True
    try:
        return number_of(one) == number_of(other)
    except ValueError:
        return False


def conditions_of(texts: Sequence[str]) -> tuple[Condition, ...]:
    """Parse the conditions of --where; raises InputError."""
    found = []
    for text in texts:
        parts = WRITTEN.fullmatch(text)
        if parts is None:
            raise InputError(f"--where {text}: expected COLUMN=VALUE, or !=, <, <=, > or >= in place of =.")
        one = Condition(*parts.groups())
        if one.sign in ORDER:
            try:
                number_of(one.value)
            except ValueError:
                raise InputError(
                    f"--where {text}: {one.value!r} is not a number, which {one.sign} needs."
                ) from None
        found.append(one)
    return tuple(found)


def fulfilling(table: Table, conditions: Sequence[Condition], names: Mapping[str, str], source: str) -> Table:
    """Keep the rows that fulfil all conditions; `names` maps this project's names of columns to the file's.

    Raises InputError for a column that the table lacks, and for a text whose size is compared, with its place.
    """
    rows = table.rows
    for one in conditions:
        name = one.column if one.column in table.header else names.get(one.column, one.column)
        if name not in table.columns:
            raise InputError(
                f"--where {one.text}: {source} has no column {one.column}; it has {listed(table.header)}."
            )
        j = table.columns.index(name)
        kept = []
        for number, cells in rows:
            try:
                if one.holds(cells[j]):
                    kept.append((number, cells))
            except ValueError:
                raise InputError(
                    f"{source}: row {number}, column {name}: {plain(cells[j])!r} is not a number, which "
                    f"--where {one.text} needs."
                ) from None
        rows = kept
    return table._replace(rows=rows)


def seen(tables: Sequence[Table], condition: Condition, names: Mapping[str, str]) -> str:
    """Write the most frequent values of a condition's column."""
    found = Counter[str]()
    for table in tables:
        name = condition.column if condition.column in table.header else names.get(condition.column, "")
        if name in table.columns:
            j = table.columns.index(name)
            found.update(plain(cells[j]) or "(empty)" for _, cells in table.rows)
    more = f" and {len(found) - SHOWN:,} more" if len(found) > SHOWN else ""
    return ", ".join(value[:50] for value, _ in found.most_common(SHOWN)) + more
