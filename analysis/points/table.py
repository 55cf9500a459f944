"""The Points table: one row for each finished run, read from CSV, Parquet or JSON lines and checked in stages.

Reading refuses errors (text for a number, an impossible loss, one run with two losses) and names file, row and column.
Checking sets aside valid rows that must not enter a fit, each with its reason. Nothing else is dropped; outliers
are dropped only on request (analysis.findings.notes).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.errors import InputError
from analysis.laws.catalogue import registered_inputs
from analysis.laws.law import SIZE, Law
from analysis.points.read import MAX_CELL, listed, read_rows, refuse_rows

if TYPE_CHECKING:
    import pandas as pd

REQUIRED = ("architecture", "n_params", "tokens", "loss")
OPTIONAL = ("run_id", "cluster", "iterations", "flops", "seed", "annealed", "n_params_non_embedding")
TEXT = ("architecture", "run_id", "cluster")

CEILING = {"loss": 1e3, "flops": 1e40, "n_params_non_embedding": 1e18}
"""Largest value of each column that is no input of a law; an input has its own."""
FLOOR = 1e-6
"""Smallest value of any column of numbers."""

TRUE = ("true", "1", "1.0", "yes")
FALSE = ("false", "0", "0.0", "no")


@dataclass(frozen=True)
class Exclusion:
    """A row left out of the fits, with the stage that left it out and the reason."""

    row: int
    run_id: str
    architecture: str
    n_params: float
    tokens: float
    loss: float
    code: str
    reason: str


@dataclass(frozen=True)
class CheckedPoints:
    """Points that may enter a fit (`frame`) and a list of those that may not (`exclusions`).

    A fit uses either annealed points or points taken mid-run; `others` holds those of the other kind, to compare them
    with its law.
    """

    frame: pd.DataFrame
    exclusions: tuple[Exclusion, ...]
    others: pd.DataFrame
    annealed: bool = True

    @property
    def architectures(self) -> tuple[str, ...]:
        """Names in sorted order."""
        return tuple(sorted(set(self.frame["architecture"])))

    @property
    def frames(self) -> dict[str, pd.DataFrame]:
        """Rows of each architecture, in the order of `architectures`."""
        return {name: self.of(name) for name in self.architectures}

    def of(self, architecture: str) -> pd.DataFrame:
        """Return the rows of one architecture, ordered by size, tokens and run."""
        rows = self.frame[self.frame["architecture"] == architecture]
        return rows.sort_values(["n_params", "tokens", "run_id"], kind="stable").reset_index(drop=True)


def known_columns() -> tuple[str, ...]:
    """Return the columns that a table may have: those of every study and the inputs of registered laws."""
    return tuple(dict.fromkeys((*REQUIRED, *OPTIONAL, *registered_inputs())))


def read_table(path: Path, columns: Mapping[str, str] | None = None) -> pd.DataFrame:
    """Read a Points table as CSV, Parquet, JSON lines or JSON; `columns` maps this project's names to the file's.

    A name that begins with = is a value for every row: {"architecture": "=mine"}. Returns the columns of
    known_columns() and `row`, the line of the file (the header is line 1). A missing `cluster` becomes the run_id, else
    architecture, size and seed; a missing run_id becomes the row's number. Raises InputError with file, row and column.
    """
    path = Path(path)
    columns = columns or {}
    known = known_columns()
    unknown = sorted(set(columns) - set(known))
    if unknown:
        name = unknown[0]
        raise InputError(f"--column {name}={columns[name]}: {name} is none of {', '.join(known)}.")
    if not path.is_file():
        raise InputError(
            f"{path}: there is no such file; give a CSV or Parquet table with the columns {', '.join(REQUIRED)}."
        )
    table = read_rows(path, [columns.get(name, name) for name in known])
    if not table.header:
        raise InputError(
            f"{path}: the file is empty; it needs the columns {', '.join(REQUIRED)} and one row for each run."
        )
    _refuse_missing(table.header, str(path), columns)
    return build_frame(table.columns, table.rows, str(path), columns)


def build_frame(
    header: Sequence[str],
    rows: Sequence[tuple[int, Sequence[object]]],
    source: str,
    columns: Mapping[str, str] | None = None,
) -> pd.DataFrame:
    """Make the Points frame from (row number, cells) pairs, converting and checking every cell; raises InputError."""
    import pandas as pd

    columns = columns or {}
    known = known_columns()
    ceilings = CEILING | {name: one.ceiling for name, one in registered_inputs().items()}
    _refuse_missing(header, source, columns)
    if not rows:
        raise InputError(
            f"{source}: the table has a header and no rows; a fit needs at least one finished run."
        )
    refuse_rows(len(rows), source)
    data: dict[str, list[object]] = {"row": [number for number, _ in rows]}
    for name in known:
        theirs = columns.get(name, name)
        if theirs in header:
            j, ceiling = list(header).index(theirs), ceilings.get(name, math.inf)
            data[name] = [_cell(cells[j], name, ceiling, number, source) for number, cells in rows]
        else:
            data[name] = [None] * len(rows)
    _fill_identity(data)
    data["annealed"] = [value is not False for value in data["annealed"]]
    kinds = dict.fromkeys(known, float) | dict.fromkeys(TEXT, str) | {"annealed": bool}
    frame = pd.DataFrame(data).astype(kinds)
    _refuse_contradictions(frame, source)
    return frame


def _refuse_missing(header: Sequence[str], source: str, columns: Mapping[str, str]) -> None:
    """Raise InputError if a table lacks a required column or one that --column names."""
    missing = [name for name in REQUIRED if name not in columns and name not in header]
    if missing:
        several = len(missing) > 1
        raise InputError(
            f"{source}: column{'s' if several else ''} {', '.join(missing)} {'are' if several else 'is'} missing; "
            f"it has {listed(header)} (map another name with --column {missing[0]}=NAME, or give "
            f"one value for every row with --column {missing[0]}==VALUE)."
        )
    for name, theirs in columns.items():
        if theirs not in header:
            raise InputError(
                f"{source}: no column {theirs!r} for --column {name}={theirs}; it has {listed(header)}."
            )


def check_points(frame: pd.DataFrame, law: Law | None = None, *, annealed: bool = True) -> CheckedPoints:
    """Set aside, in stages, duplicate rows, rows of the other kind, and architectures that `law` cannot be fitted to.

    The kind is annealed points or, with annealed=False, points taken mid-run. An architecture with too few points
    is set aside only if another one can be fitted. Raises InputError if no point is left.
    """
    identity = ["run_id", "tokens"]
    named = ["architecture", "n_params", *identity, "loss", "annealed"]
    unnamed = [name for name in frame.columns if name not in {"row", "run_id"}]
    anonymous = frame["run_id"].str.startswith("row-")
    twice = (frame.duplicated(named) & ~anonymous) | (frame.duplicated(unnamed) & anonymous)
    other = frame["annealed"] != annealed
    if annealed:
        kind, why = "unannealed", "taken before the learning rate decayed, where the loss is biased upwards"
    else:
        kind, why = (
            "annealed",
            "taken after the learning rate decayed, and the fit is of points taken mid-run",
        )
    stages = [
        ("duplicate", twice, "an earlier row has the same run at the same tokens with the same loss"),
        (kind, other, why),
    ]
    kept = frame
    excluded: list[Exclusion] = []
    for code, hit, reason in stages:
        kept, out = exclude(kept, hit.loc[kept.index], code, reason)
        excluded += out
    if law is not None:
        reasons = {str(name): too_few(rows, law) for name, rows in kept.groupby("architecture")}
        few = {name: reason for name, reason in reasons.items() if reason}
        if len(few) < len(reasons):
            kept, out = exclude(kept, kept["architecture"].isin(few), "too_few", "")
            out.sort(key=lambda one: one.architecture)
            excluded += [replace(one, reason=few[one.architecture]) for one in out]
    if kept.empty:
        raise InputError(
            f"no point is left to fit: all {len(frame)} rows were set aside ({excluded[-1].reason}); "
            f"give {'finished, annealed runs' if annealed else 'points taken mid-run, with annealed=false'}."
        )
    others = frame[other & ~twice].reset_index(drop=True)
    return CheckedPoints(kept.reset_index(drop=True), tuple(excluded), others, annealed)


def exclude(
    frame: pd.DataFrame, hit: pd.Series[bool], code: str, reason: str
) -> tuple[pd.DataFrame, list[Exclusion]]:
    """Return the rows that `hit` does not mark, and an Exclusion for each row that it marks."""
    out = frame.loc[hit, ["row", "run_id", "architecture", "n_params", "tokens", "loss"]]
    out = out.assign(code=code, reason=reason)
    return frame[~hit], [Exclusion(*cells) for cells in out.itertuples(index=False, name=None)]


def too_few(frame: pd.DataFrame, law: Law) -> str:
    """Return why a law cannot be fitted to the rows of one architecture, or an empty string."""
    rows, wanted = [int(row) for row in frame["row"]], len(law.names)
    name = str(frame["architecture"].iloc[0])
    where = f"row {rows[0]}" if len(rows) == 1 else f"rows {min(rows)} to {max(rows)}"
    first = law.inputs[0]
    values = frame[first.column].dropna().unique()
    if len(values) == 1:
        needs, other = ("sizes", "; --law data needs one size only") if first == SIZE else ("values", "")
        return (
            f"{where}, column {first.column}: {name} has {float(values[0]):.15g} in every row, and law {law.name} "
            f"needs several {needs}, better three or more{other}"
        )
    if len(rows) < wanted:
        return (
            f"{where}, column architecture: {name} has {len(rows)} row{'s' if len(rows) > 1 else ''}, fewer than the "
            f"{wanted} parameters of law {law.name}"
        )
    return ""


def _cell(value: object, name: str, ceiling: float, row: int, source: str) -> object:
    place = f"{source}: row {row}, column {name}:"
    text = "" if value is None else str(value).strip()
    if len(text) > MAX_CELL:
        raise InputError(f"{place} has {len(text):,} characters, and at most {MAX_CELL:,} are read.")
    empty = text == "" or (name not in TEXT and text.lower() in {"nan", "none", "null", "na", "<na>"})
    if name in TEXT:
        if empty or text in {"nan", "None", "<NA>"}:
            if name == "architecture":
                raise InputError(f"{place} is empty; name the architecture.")
            return None
        return text
    if empty:
        if name in REQUIRED:
            raise InputError(f"{place} is {text or 'empty'}; it must be a number above 0.")
        return None
    if name == "annealed":
        if text.lower() in TRUE:
            return True
        if text.lower() in FALSE:
            return False
        raise InputError(f"{place} {text!r} is neither true nor false.")
    try:
        number = float(text)
    except ValueError:
        comma = "," in text and text.replace(",", ".", 1).replace(".", "", 1).isdigit()
        hint = "write decimals with a point" if comma else "it must be a number"
        raise InputError(f"{place} {text!r} is not a number; {hint}.") from None
    if name == "seed":
        if not number.is_integer():
            raise InputError(f"{place} {text} is not a whole number.")
        if number < 0:
            raise InputError(f"{place} {text} is below 0; number the seeds from 0 on.")
        return number
    if not math.isfinite(number) or number < FLOOR or number > ceiling:
        raise InputError(
            f"{place} {text} is out of range; it must be above 0 (at least {FLOOR:g}) and at most {ceiling:g}."
        )
    return number


def _fill_identity(data: dict[str, list[object]]) -> None:
    for i, row in enumerate(data["row"]):
        seed = "" if data["seed"][i] is None else f"{data['seed'][i]:g}"
        unnamed = f"{data['architecture'][i]}/{data['n_params'][i]:.15g}/{seed}"
        data["cluster"][i] = data["cluster"][i] or data["run_id"][i] or unnamed
        data["run_id"][i] = data["run_id"][i] or f"row-{row}"


def _refuse_contradictions(frame: pd.DataFrame, source: str) -> None:
    compared = ["loss", "architecture", "n_params"]
    seen: dict[tuple[str, float], tuple[Any, ...]] = {}
    for row, run_id, tokens, *values in frame[["row", "run_id", "tokens", *compared]].itertuples(index=False):
        first, *former = seen.setdefault((run_id, tokens), (row, *values))
        for name, one, other in zip(compared, former, values, strict=True):
            if one != other:
                raise InputError(
                    f"{source}: row {row}, column {name}: run {run_id} at {tokens:.15g} tokens has {one} in row "
                    f"{first} and {other} in row {row}; "
                    + ("keep one of them." if name == "loss" else "give each run its own run_id.")
                )
