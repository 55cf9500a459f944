"""The Points table: one row a finished run, read from CSV, Parquet or JSON lines and checked in stages.

Reading refuses what is wrong (text for a number, a loss that cannot be one, one run with two losses) and
names file, row and column. Checking sets aside what is right but must not enter a fit, each row with its
reason; nothing else is dropped, and outliers only on request (analysis.findings.notes).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.errors import InputError
from analysis.laws.catalogue import registered_inputs
from analysis.laws.law import SIZE, Law
from analysis.points.read import read_rows

if TYPE_CHECKING:
    import pandas as pd

REQUIRED = ("architecture", "n_params", "tokens", "loss")
OPTIONAL = (
    "run_id",
    "cluster",
    "iterations",
    "flops",
    "seed",
    "annealed",
    "n_params_non_embedding",
)
TEXT = ("architecture", "run_id", "cluster")

CEILING = {"loss": 1e3, "flops": 1e40, "n_params_non_embedding": 1e18}
"""The largest value a column may hold that is no input of a law: an input names its own."""
FLOOR = 1e-6
"""The smallest value a column may hold, whatever its unit."""

TRUE = ("true", "1", "1.0", "yes")
FALSE = ("false", "0", "0.0", "no")


@dataclass(frozen=True)
class Exclusion:
    """A row left out of the fits, with the stage that left it out and why."""

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
    """Points that may enter a fit (`frame`) and, listed one by one, those that may not (`exclusions`).

    A fit holds annealed points or points taken mid-run, never both; those of the other kind are in `others`, to be
    compared with its law.
    """

    frame: pd.DataFrame
    exclusions: tuple[Exclusion, ...]
    others: pd.DataFrame
    annealed: bool = True

    @property
    def architectures(self) -> tuple[str, ...]:
        """Names in sorted order."""
        return tuple(sorted(set(self.frame["architecture"])))

    def of(self, architecture: str) -> pd.DataFrame:
        """Rows of one architecture, ordered by size, tokens and run."""
        rows = self.frame[self.frame["architecture"] == architecture]
        return rows.sort_values(["n_params", "tokens", "run_id"], kind="stable").reset_index(drop=True)


def known_columns() -> tuple[str, ...]:
    """Columns that a table may have: those of every study, and what the registered laws read besides."""
    return tuple(dict.fromkeys((*REQUIRED, *OPTIONAL, *registered_inputs())))


def read_table(path: Path, columns: Mapping[str, str] | None = None) -> pd.DataFrame:
    """Read a Points table as CSV, Parquet, JSON lines or JSON; `columns` maps this project's names to the file's own.

    A name that begins with = is a value for every row: {"architecture": "=mine"}.

    Returns every column of known_columns() plus `row`, the line of the file (the header is line 1). A missing
    `cluster` becomes the run_id, else architecture, size and seed; a missing run_id becomes the row's number.
    Raises InputError naming file, row and column.
    """
    path = Path(path)
    columns = dict(columns or {})
    known = known_columns()
    unknown = sorted(set(columns) - set(known))
    if unknown:
        raise InputError(
            f"--column {unknown[0]}={columns[unknown[0]]}: {unknown[0]} is none of {', '.join(known)}."
        )
    if not path.is_file():
        raise InputError(
            f"{path}: no such file; give a CSV or Parquet table with the columns {', '.join(REQUIRED)}."
        )
    header, rows = read_rows(path, [name for name in columns.values() if name.startswith("=")])
    if not header:
        raise InputError(
            f"{path}: the file is empty; it needs the columns {', '.join(REQUIRED)} and one row a run."
        )
    return build_frame(header, rows, str(path), columns)


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
    where: dict[str, int] = {}
    missing = [name for name in REQUIRED if name not in columns and name not in header]
    if missing:
        several = len(missing) > 1
        raise InputError(
            f"{source}: column{'s' if several else ''} {', '.join(missing)} {'are' if several else 'is'} missing; "
            f"it has {', '.join(header) or 'no columns'} (map another name with --column {missing[0]}=NAME, or give "
            f"one value for every row with --column {missing[0]}==VALUE)."
        )
    for name in known:
        theirs = columns.get(name, name)
        if theirs in header:
            where[name] = list(header).index(theirs)
        elif name in columns:
            raise InputError(
                f"{source}: no column {theirs!r} for --column {name}={theirs}; it has {', '.join(header)}."
            )
    if not rows:
        raise InputError(
            f"{source}: the table has a header and no rows; a fit needs at least one finished run."
        )
    data: dict[str, list[object]] = {"row": [number for number, _ in rows]}
    for name in known:
        if name in where:
            ceiling = ceilings.get(name, math.inf)
            data[name] = [_cell(cells[where[name]], name, ceiling, number, source) for number, cells in rows]
        else:
            data[name] = [None] * len(rows)
    _fill_identity(data)
    frame = pd.DataFrame(data)
    for name in known:
        if name in TEXT:
            frame[name] = frame[name].astype(str)
        elif name != "annealed":
            frame[name] = frame[name].astype(float)
    frame["annealed"] = [value is not False for value in data["annealed"]]
    _refuse_contradictions(frame, source)
    return frame


def check_points(frame: pd.DataFrame, law: Law | None = None, *, annealed: bool = True) -> CheckedPoints:
    """Set aside, in stages, rows counted twice, rows of the other kind, and what `law` cannot be fitted to.

    The kind is annealed points or, on request, those taken before the learning rate was annealed. An architecture with
    too few points for the law is set aside only while another can be fitted (InputError otherwise).
    """
    identity = ["run_id", "tokens"]
    named = ["architecture", "n_params", *identity, "loss", "annealed"]
    unnamed = [name for name in frame.columns if name not in {"row", "run_id"}]
    anonymous = frame["run_id"].str.startswith("row-")
    twice = (frame.duplicated(named) & ~anonymous) | (frame.duplicated(unnamed) & anonymous)
    other = ~frame["annealed"] if annealed else frame["annealed"]
    kind = (
        ("unannealed", other, "taken before the learning rate decayed, where the loss is biased upwards")
        if annealed
        else (
            "annealed",
            other,
            "taken after the learning rate decayed, and the fit is of points taken mid-run",
        )
    )
    stages = [
        ("duplicate", twice, "the same run at the same tokens with the same loss stands in an earlier row"),
        kind,
    ]
    if law is not None:
        rest = frame[~twice & ~other]
        reasons = {name: too_few(rows, law) for name, rows in rest.groupby("architecture")}
        if any(reasons.values()) and not all(reasons.values()):
            stages += [
                ("too_few", frame["architecture"] == name, reason)
                for name, reason in reasons.items()
                if reason
            ]
    kept = frame
    excluded: list[Exclusion] = []
    for code, hit, reason in stages:
        kept, out = exclude(kept, hit.loc[kept.index], code, reason)
        excluded += out
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
    """Return the rows of a frame that `hit` does not mark, and for each that it does why it was left out."""
    out = frame.loc[hit, ["row", "run_id", "architecture", "n_params", "tokens", "loss"]]
    out = out.assign(code=code, reason=reason)
    return frame[~hit], [Exclusion(*cells) for cells in out.itertuples(index=False, name=None)]


def too_few(frame: pd.DataFrame, law: Law) -> str:
    """Return why the rows of one architecture cannot carry a law at all, naming row and column, or nothing."""
    rows, wanted = [int(row) for row in frame["row"]], len(law.names)
    name = str(frame["architecture"].iloc[0])
    where = f"row {rows[0]}" if len(rows) == 1 else f"rows {min(rows)} to {max(rows)}"
    first = law.inputs[0]
    values = frame[first.column].dropna().unique()
    if len(values) == 1:
        needs, other = ("sizes", "; --law data needs one size only") if first == SIZE else ("values", "")
        return (
            f"{where}, column {first.column}: {name} has {float(values[0]):.15g} throughout, and law {law.name} needs "
            f"several {needs}, better three or more{other}"
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
        named = data["run_id"][i] is not None
        if not named:
            data["run_id"][i] = f"row-{row}"
        if data["cluster"][i] is None:
            size = data["n_params"][i]
            seed = data["seed"][i]
            data["cluster"][i] = (
                data["run_id"][i]
                if named
                else f"{data['architecture'][i]}/{size:.15g}/{'' if seed is None else f'{seed:g}'}"
            )


def _refuse_contradictions(frame: pd.DataFrame, source: str) -> None:
    seen: dict[tuple[str, float], int] = {}
    for i in range(len(frame)):
        run_id, tokens, loss = str(frame["run_id"][i]), float(frame["tokens"][i]), float(frame["loss"][i])
        first = seen.setdefault((run_id, tokens), i)
        if float(frame["loss"][first]) != loss:
            raise InputError(
                f"{source}: row {frame['row'][i]}, column loss: run {run_id} at {tokens:.15g} tokens has {loss:g} "
                f"and row {frame['row'][first]} says {float(frame['loss'][first]):g}; keep one of them."
            )
        for name in ("architecture", "n_params"):
            if frame[name][first] != frame[name][i]:
                raise InputError(
                    f"{source}: row {frame['row'][i]}, column {name}: run {run_id} at {tokens:.15g} tokens also stands "
                    f"in row {frame['row'][first]} with another {name}; give each run its own run_id."
                )
