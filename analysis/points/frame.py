"""The Points frame: cells of one or several tables, converted and checked column by column."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from analysis.errors import InputError
from analysis.laws.law import Law
from analysis.points.columns import (
    CODEBOOK,
    REQUIRED,
    TEXT,
    UNFINISHED,
    Cells,
    is_setting,
    known_columns,
)
from analysis.points.files import Table, listed, refuse_rows
from analysis.points.note import Note
from analysis.points.units import SIZES, refuse_units
from analysis.points.where import Condition, fulfilling, seen
from analysis.points.wide import RUN

if TYPE_CHECKING:
    import pandas as pd

GAPS = "gaps"
"""Column of the frame with the cells that hold no value: pairs of a column and what it holds, such as "is NaN"."""
TOKENS_FROM: Mapping[str, tuple[str, float]] = {
    "flops/6n": ("n_params", 6.0),
    "flops/6n_non_embedding": ("n_params_non_embedding", 6.0),
}
"""Conventions that give tokens: the column of sizes, and the FLOPs a parameter and token."""


@dataclass(frozen=True)
class Wishes:
    """All that a user may say about the reading of tables."""

    columns: Mapping[str, str] = field(default_factory=dict)
    """Names of the file's columns by this project's names; "=TEXT" is a value for every row."""
    units: Mapping[str, float] = field(default_factory=dict)
    """Factors by which columns are multiplied, by this project's names."""
    where: tuple[Condition, ...] = ()
    settings: tuple[str, ...] = ()
    """Further columns that are settings of training."""
    tokens_from: str | None = None
    """Convention of TOKENS_FROM by which tokens follow from FLOPs."""
    law: Law | None = None
    """Law whose columns are needed; the usual REQUIRED ones if it is None."""

    @property
    def needed(self) -> tuple[str, ...]:
        """Columns, by this project's names, that the tables must have."""
        columns = needed_columns(self.law)
        if self.tokens_from is None:
            return columns
        size, _ = TOKENS_FROM[self.tokens_from]
        return tuple(dict.fromkeys((*(name for name in columns if name != "tokens"), size, "flops")))


def needed_columns(law: Law | None) -> tuple[str, ...]:
    """Return the columns without which a row cannot be fitted, by a law or, without one, by the usual ones."""
    return REQUIRED if law is None else tuple(dict.fromkeys(("architecture", *law.columns, "loss")))


def frame_of(
    tables: Sequence[Table], sources: Sequence[str], wishes: Wishes, *, of_people: bool = True
) -> pd.DataFrame:
    """Convert and check the cells of tables, and join their rows; raises InputError with file, row and column.

    `of_people` is False for tables that this project writes: their sizes need no check of their unit.
    """
    import pandas as pd

    parts, left_out = [], 0
    for number, (table, source) in enumerate(zip(tables, sources, strict=True), 1):
        names = _names_in(table, source, wishes, alone=len(tables) == 1)
        chosen = fulfilling(table, wishes.where, names, source)
        left_out += len(table.rows) - len(chosen.rows)
        parts.append(_converted(chosen, source, names, wishes, number if number > 1 else None, of_people))
    count = sum(len(table.rows) for table in tables)
    refuse_rows(count, sources[0] if len(sources) == 1 else f"{len(sources)} files")
    if not count:
        raise InputError(
            f"{sources[0]}: the table has a header and no rows; a fit needs at least one finished run."
        )
    if left_out == count:
        raise InputError(_nothing_left(tables, wishes))
    frame = pd.concat(parts, ignore_index=True) if len(parts) > 1 else parts[0]
    lacking = [name for name in frame.columns if is_setting(name) or name in wishes.settings]
    frame[lacking] = frame[lacking].fillna("")  # the settings that only another file has
    if wishes.tokens_from is not None:
        frame = _with_tokens(frame, wishes.tokens_from)
    _refuse_contradictions(frame)
    frame.attrs["notes"] = tuple(_notes(tables, wishes, left_out, count))
    return frame


def _names_in(table: Table, source: str, wishes: Wishes, *, alone: bool) -> dict[str, str]:
    """Return the table's names of the columns it has, by this project's names; raises InputError for missing ones."""
    header = set(table.header)
    names = {}
    for wish, theirs in wishes.columns.items():
        if theirs in header:
            names[wish] = theirs
        elif alone or wish not in header:
            raise InputError(
                f"{source}: no column {theirs!r} for --column {wish}={theirs}; it has {listed(table.header)}."
            )
    mapped = set(names.values())
    for name in table.columns:
        known = name in known_columns() or CODEBOOK.fullmatch(name) or name == "state"
        ours: str | None = name if known else None
        if ours is None and name.lower() in {"state", "status"} and _are_states(table, name):
            ours = "state"
        if ours is None and name == RUN and {"State", "annealed"} & header:
            ours = "run_id"  # by the names of an export of Weights & Biases
        if ours is None and name not in mapped and (is_setting(name) or name in wishes.settings):
            ours = name
        if ours is not None:
            names.setdefault(ours, name)
    if "state" in names and "state" not in wishes.columns and not _are_states(table, names["state"]):
        del names["state"]
    missing = [name for name in wishes.needed if name not in names]
    if missing:
        several = len(missing) > 1
        law = f" for law {wishes.law.name}" if wishes.law is not None else ""
        flops = "flops" in names and missing == ["tokens"]
        raise InputError(
            f"{source}: column{'s' if several else ''} {', '.join(missing)} {'are' if several else 'is'} missing{law}; "
            f"it has {listed(table.header)} (map another name with --column {missing[0]}=NAME, or give "
            f"one value for every row with --column {missing[0]}==VALUE"
            + ("; --tokens-from flops/6n computes tokens from FLOPs)." if flops else ").")
        )
    if wishes.tokens_from is not None and "tokens" in names:
        raise InputError(
            f"{source}: column {names['tokens']} has the tokens; leave out --tokens-from, which computes them."
        )
    return names


def _are_states(table: Table, name: str) -> bool:
    """Return True if some cell of a column is the state of an unfinished run, so that the column holds states."""
    j = table.columns.index(name)
    return any(str(cells[j]).strip().lower() in UNFINISHED for _, cells in table.rows)


def _converted(
    table: Table, source: str, names: Mapping[str, str], wishes: Wishes, part: int | None, of_people: bool
) -> pd.DataFrame:
    import pandas as pd

    rows = [number for number, _ in table.rows]
    known = known_columns()
    data: dict[str, Any] = {"row": rows, "file": source}
    gaps: dict[int, list[tuple[str, str]]] = {}
    for name in (*known, "state", *(name for name in names if name not in {*known, "state"})):
        if name not in names:
            data[name] = [True if name == "annealed" else None if name in TEXT else math.nan] * len(rows)
            continue
        j = table.columns.index(names[name])
        column = [cells[j] for _, cells in table.rows]
        cells = Cells(
            name, names[name], column, rows, source, wishes.units.get(name, 1.0), table.comma_is_decimal
        )
        if name in TEXT:
            data[name] = cells.texts()
            if name == "architecture":
                for i, text in enumerate(data[name]):
                    if text is None:
                        gaps.setdefault(i, []).append((name, "is empty"))
        elif name == "annealed":
            data[name] = cells.flags()
        elif name == "seed":
            data[name] = cells.seeds()
        elif name in known or CODEBOOK.fullmatch(name):
            data[name], found = cells.numbers()
            for i, what in found.items():
                gaps.setdefault(i, []).append((name, what))
        else:
            data[name] = cells.settings()
    if of_people:
        checked = {name: data[name] for name in SIZES if name in names}
        refuse_units(checked, names, rows, source)
    _fill_identity(data, part)
    data[GAPS] = [tuple(gaps.get(i, ())) for i in range(len(rows))]
    kinds = dict.fromkeys(known, float) | dict.fromkeys(TEXT, str) | {"annealed": bool}
    return pd.DataFrame(data).astype(kinds)


def _fill_identity(data: dict[str, Any], part: int | None) -> None:
    """Give rows without a run id or a cluster their own; `part` numbers the files after the first."""
    more = f"-file-{part}" if part else ""
    for i, row in enumerate(data["row"]):
        data["architecture"][i] = data["architecture"][i] or ""
        data["state"][i] = data["state"][i] or ""
        seed = "" if math.isnan(data["seed"][i]) else f"{data['seed'][i]:g}"
        unnamed = f"{data['architecture'][i]}/{data['n_params'][i]:.15g}/{seed}"
        data["cluster"][i] = data["cluster"][i] or data["run_id"][i] or unnamed
        data["run_id"][i] = data["run_id"][i] or f"row-{row}{more}"


def _with_tokens(frame: pd.DataFrame, convention: str) -> pd.DataFrame:
    """Compute tokens from FLOPs; a row that lacks what they follow from has the gap of that column."""
    size, factor = TOKENS_FROM[convention]
    of_tokens = [
        tuple(
            ("tokens", f"follows from {name}, which {what}") for name, what in gaps if name in {size, "flops"}
        )
        for gaps in frame[GAPS]
    ]
    gaps = [(*before, *new) for before, new in zip(frame[GAPS], of_tokens, strict=True)]
    out = frame.assign(tokens=frame["flops"] / (factor * frame[size]))
    out[GAPS] = gaps
    return out


def _refuse_contradictions(frame: pd.DataFrame) -> None:
    """Raise InputError if finished rows of one run at the same tokens differ in what they measured or in what it is."""
    compared = ["loss", "architecture", *(["n_params"] if frame["n_params"].notna().any() else [])]
    at = next((name for name in ("tokens", "iterations", "flops") if frame[name].notna().any()), None)
    given = frame[[*compared, *([at] if at else [])]].notna().all(axis=1)
    usable = given & ~frame["state"].str.lower().isin(UNFINISHED)
    seen: dict[tuple[str, float], tuple[Any, ...]] = {}
    columns = frame.assign(amount=frame[at] if at else 0.0).loc[usable]
    for file, row, run_id, amount, *values in columns[
        ["file", "row", "run_id", "amount", *compared]
    ].itertuples(index=False):
        first_file, first, *former = seen.setdefault((run_id, amount), (file, row, *values))
        for name, one, other in zip(compared, former, values, strict=True):
            if one != other:
                where = f"row {first}" if first_file == file else f"row {first} of {first_file}"
                training = f" at {amount:.15g} {at}" if at else ""
                raise InputError(
                    f"{file}: row {row}, column {name}: run {run_id}{training} has {one} in {where} and {other} in row "
                    f"{row}; " + ("keep one of them." if name == "loss" else "give each run its own run_id.")
                )


def _nothing_left(tables: Sequence[Table], wishes: Wishes) -> str:
    written = " and ".join(f"--where {one.text}" for one in wishes.where)
    first = wishes.where[0]
    return (
        f"{written}: no row fulfils {'it' if len(wishes.where) == 1 else 'all of them'}; column {first.column} has "
        + (f"{seen(tables, first, wishes.columns)}.")
    )


def _notes(tables: Sequence[Table], wishes: Wishes, left_out: int, count: int) -> list[Note]:
    notes = []
    if wishes.where:
        written = " and ".join(one.text for one in wishes.where)
        text = f"{left_out} of {count} rows do not fulfil {written} and were not read, as requested."
        notes.append(Note("where", text))
    comments = sum(table.comments for table in tables)
    if comments:
        notes.append(
            Note("comment_lines", f"{comments} lines among the rows begin with # and were passed over.")
        )
    if wishes.tokens_from is not None:
        size, factor = TOKENS_FROM[wishes.tokens_from]
        text = (
            f"tokens are flops / ({factor:g} {size}), on request: the table has none, and the convention counts no "
            "FLOPs of attention, so that tokens of small models come out too large if the FLOPs do."
        )
        notes.append(Note("tokens_from_flops", text))
    return notes
