"""The Points table: one row for each finished run, read from files of several kinds and checked in stages.

Reading refuses errors (text for a number, an impossible loss, one run with two losses) and names file, row and column.
Checking sets aside valid rows that must not enter a fit, each with its reason. Nothing else is dropped; outliers
are dropped only on request (analysis.findings.notes).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.errors import InputError
from analysis.laws.law import SIZE, Law
from analysis.points.columns import ABSENT, AXES, CODEBOOK, FINISHED, is_setting, known_columns, may_be_mapped
from analysis.points.files import Table
from analysis.points.frame import GAPS, TOKENS_FROM, Wishes, frame_of, needed_columns
from analysis.points.note import Note
from analysis.points.read import FILE, read_rows
from analysis.points.sweeps import (
    best_of,
    cells_of,
    differing_arms,
    refuse_sweeps,
    setting_named,
    settings_of,
)
from analysis.points.where import conditions_of
from analysis.points.wide import RUN, long_form, of_a_run

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Exclusion:
    """A row left out of the fits, with the stage that left it out and the reason; None for a number it lacks."""

    row: int
    run_id: str
    architecture: str
    n_params: float | None
    tokens: float | None
    loss: float | None
    code: str
    reason: str
    file: str = ""


@dataclass(frozen=True)
class CheckedPoints:
    """Points that may enter a fit (`frame`) and a list of those that may not (`exclusions`).

    A fit uses either annealed points or points taken mid-run; `others` holds those of the other kind, to compare them
    with its law. `notes` tell what was read and chosen.
    """

    frame: pd.DataFrame
    exclusions: tuple[Exclusion, ...]
    others: pd.DataFrame
    annealed: bool = True
    notes: tuple[Note, ...] = ()

    @property
    def architectures(self) -> tuple[str, ...]:
        """Names in sorted order."""
        return tuple(sorted(set(self.frame["architecture"])))

    @property
    def frames(self) -> dict[str, pd.DataFrame]:
        """Rows of each architecture, in the order of `architectures`."""
        return {name: self.of(name) for name in self.architectures}

    @property
    def codebooks(self) -> tuple[str, ...]:
        """Columns of the losses of single codebooks, in their order."""
        names = [name for name in self.frame.columns if CODEBOOK.fullmatch(name)]
        return tuple(sorted(names, key=lambda name: (len(name), name)))

    def of(self, architecture: str) -> pd.DataFrame:
        """Return the rows of one architecture, ordered by size, tokens and run."""
        return self.ordered(architecture).reset_index(drop=True)

    def ordered(self, architecture: str) -> pd.DataFrame:
        """Return the rows of one architecture in the same order, with the index they have in `frame`."""
        rows = self.frame[self.frame["architecture"] == architecture]
        return rows.sort_values(["n_params", "tokens", "run_id"], kind="stable")


def read_table(
    paths: Path | str | Sequence[Path | str],
    columns: Mapping[str, str] | None = None,
    *,
    law: Law | None = None,
    where: Sequence[str] = (),
    units: Mapping[str, float] | None = None,
    settings: Sequence[str] = (),
    tokens_from: str | None = None,
) -> pd.DataFrame:
    """Read Points tables as CSV, Parquet, JSON lines or JSON; `columns` maps this project's names to the files'.

    A name that begins with = is a value for every row, {"architecture": "=mine"}, and @file is the file's own name. The
    tables need the columns of `law`, by default those of size and tokens. `where` holds conditions such as lr<=0.001,
    `units` factors of columns, `settings` names of columns that are settings of training, and `tokens_from` a
    convention that computes tokens from FLOPs. Returns the columns of known_columns(), losses of codebooks, settings,
    `file`, and `row`, the line of the file (the header is line 1). A missing `cluster` becomes the run_id, else
    architecture, size and seed; a missing run_id becomes the row's number. Raises InputError with file, row and column.
    """
    given = [Path(path) for path in ([paths] if isinstance(paths, Path | str) else paths)]
    wishes = Wishes(
        columns or {}, units or {}, conditions_of(where), tuple(settings), _convention(tokens_from), law
    )
    for option, names in (("--column", wishes.columns), ("--unit", wishes.units)):
        unknown = sorted(name for name in names if not may_be_mapped(name))
        if unknown:
            known = ", ".join((*known_columns(), "state", "loss_q0"))
            raise InputError(f"{option} {unknown[0]}={names[unknown[0]]}: {unknown[0]} is none of {known}.")
    needed = ", ".join(wishes.needed)
    for path in given:
        if not path.is_file():
            raise InputError(
                f"{path}: there is no such file; give a CSV or Parquet table with the columns {needed}."
            )
    theirs = set(wishes.columns.values())
    added = tuple(name for name in wishes.columns.values() if name.startswith("=") or name == FILE)
    asked = {*theirs, *known_columns(), *wishes.settings, *(one.column for one in wishes.where), RUN}

    def wanted(name: str) -> bool:
        lower = name.lower() in {"state", "status"}
        return name in asked or lower or is_setting(name) or of_a_run(name) or bool(CODEBOOK.fullmatch(name))

    tables = [read_rows(path, wanted, added) for path in given]
    for path, table in zip(given, tables, strict=True):
        if not table.header:
            raise InputError(
                f"{path}: the file is empty; it needs the columns {needed} and one row for each run."
            )
    sources = [str(path) for path in given]
    return frame_of(*long_form(tables, sources, wishes.columns, added), wishes)


def build_frame(
    header: Sequence[str],
    rows: Sequence[tuple[int, Sequence[object]]],
    source: str,
    where: Sequence[str] = (),
) -> pd.DataFrame:
    """Make the Points frame of this project's own (row number, cells) pairs, checking every cell; raises InputError."""
    table = Table(list(header), list(header), list(rows))
    return frame_of([table], [source], Wishes(where=conditions_of(where)), of_people=False)


def _convention(name: str | None) -> str | None:
    if name is not None and name not in TOKENS_FROM:
        raise InputError(
            f"--tokens-from {name}: there is no such convention; choose {' or '.join(TOKENS_FROM)}."
        )
    return name


def check_points(
    frame: pd.DataFrame, law: Law | None = None, *, annealed: bool = True, best: Sequence[str] = ()
) -> CheckedPoints:
    """Set aside, in stages, rows without a result, duplicates, rows of the other kind, and what `law` cannot use.

    The kind is annealed points or, with annealed=False, points taken mid-run. Of runs that differ only in the settings
    `best`, those with the lowest loss are kept; runs that differ only in other settings are refused, since they are no
    seeds. An architecture with too few points is set aside only if another one can be fitted. Raises InputError if no
    point is left.
    """
    notes: list[Note] = list(frame.attrs.get("notes", ()))
    frame = frame.copy()
    needed = needed_columns(law)
    notes += _stand_ins(frame, needed)
    reasons = _without_result(frame, needed)
    unusable = reasons != ""
    unfinished = (frame["state"] != "") & ~frame["state"].str.lower().isin(FINISHED)
    frame = frame.drop(columns=[GAPS, "state"])
    identity = ["run_id", "tokens"]
    named = ["architecture", "n_params", *identity, "loss", "annealed"]
    unnamed = [name for name in frame.columns if name not in {"row", "file", "run_id"}]
    anonymous = frame["run_id"].str.startswith("row-")
    twice = (frame.duplicated(named) & ~anonymous) | (frame.duplicated(unnamed) & anonymous)
    twice &= ~unusable
    other = frame["annealed"] != annealed
    if annealed:
        kind, why = "unannealed", "taken before the learning rate decayed, where the loss is biased upwards"
    else:
        kind, why = (
            "annealed",
            "taken after the learning rate decayed, and the fit is of points taken mid-run",
        )
    stages = [
        ("unfinished", unfinished, ""),
        ("duplicate", twice, "an earlier row has the same run at the same tokens with the same loss"),
        (kind, other, why),
        ("unusable", unusable, ""),
    ]
    kept = frame
    excluded: list[Exclusion] = []
    for code, hit, reason in stages:
        left = hit.loc[kept.index]
        kept, out = exclude(kept, left, code, reason or reasons.loc[left.index[left]])
        excluded += out
    chosen = [setting_named(name, kept) for name in best]
    if settings_of(kept):
        cells = cells_of(kept)
        if chosen and not kept.empty:
            beaten, found = best_of(kept, chosen, cells)
            kept, out = exclude(kept, beaten != "", "not_best", beaten[beaten != ""])
            excluded += out
            notes += found
        refuse_sweeps(kept, cells.loc[kept.index])
    if law is not None:
        few = {
            str(name): reason for name, rows in kept.groupby("architecture") if (reason := too_few(rows, law))
        }
        if len(few) < kept["architecture"].nunique():
            kept, out = exclude(kept, kept["architecture"].isin(few), "too_few", "")
            out.sort(key=lambda one: one.architecture)
            excluded += [replace(one, reason=few[one.architecture]) for one in out]
    if kept.empty:
        raise InputError(_nothing_left(frame, excluded, annealed))
    notes += differing_arms(kept)
    others = frame[other & ~twice & ~unusable & ~unfinished].reset_index(drop=True)
    return CheckedPoints(kept.reset_index(drop=True), tuple(excluded), others, annealed, tuple(notes))


def _stand_ins(frame: pd.DataFrame, needed: Sequence[str]) -> list[Note]:
    """Fill in sizes and tokens that some rows lack and the law does not use.

    Tokens become iterations, or else follow from FLOPs, so that runs of different lengths do not count as seeds.
    """
    notes = []
    for name in AXES:
        missing = int(frame[name].isna().sum())
        if missing and name not in needed:
            if name == "tokens" and frame["iterations"].notna().all():
                frame[name], instead = frame["iterations"], "an iteration counts as one token"
            elif name == "tokens" and frame["flops"].notna().all():
                frame[name], instead = frame["flops"] / (6 * frame["n_params"]), "it is flops / (6 n_params)"
            else:
                frame[name], instead = ABSENT, "all rows count as alike in it"
            text = f"column {name} is empty in {missing} of {len(frame)} rows, and the law does not use it: {instead}."
            notes.append(Note(f"no_{name}", text))
    return notes


def _without_result(frame: pd.DataFrame, needed: Sequence[str]) -> pd.Series[str]:
    """Return for each row why it has no result: its state, and the needed cells that hold no value."""
    import pandas as pd

    found = []
    for state, gaps in zip(frame["state"], frame[GAPS], strict=True):
        parts = [f"its state is {state}"] if state and state.lower() not in FINISHED else []
        parts += [f"column {name} {what}" for name, what in gaps if name in needed]
        found.append(", ".join(parts))
    missing = frame[[name for name in needed if name != "architecture"]].isna()
    out = pd.Series(found, index=frame.index, dtype=object)
    for name in missing.columns:
        out = out.mask(missing[name] & (out == ""), f"column {name} is empty")
    return out


def _nothing_left(frame: pd.DataFrame, excluded: Sequence[Exclusion], annealed: bool) -> str:
    """Say that all rows were set aside: by each reason how many, and where the first of them is."""
    counts = Counter(one.reason for one in excluded)
    first = {one.reason: one for one in reversed(excluded)}
    several = frame["file"].nunique() > 1
    parts: list[str] = []
    for reason, count in counts.most_common(3):
        one = first[reason]
        place = f"{one.file}: row {one.row}" if several or not parts else f"row {one.row}"
        parts.append(f"{place}{f' and {count - 1} more' if count > 1 else ''}: {reason}")
    rows = f"all {len(frame)} rows were" if len(frame) > 1 else "its one row was"
    return (
        f"no point is left to fit: {rows} set aside ({'; '.join(parts)}); "
        f"give {'finished, annealed runs' if annealed else 'points taken mid-run, with annealed=false'}."
    )


def exclude(
    frame: pd.DataFrame, hit: pd.Series[bool], code: str, reason: str | pd.Series[str]
) -> tuple[pd.DataFrame, list[Exclusion]]:
    """Return the rows that `hit` does not mark, and an Exclusion for each row that it marks.

    `reason` is that of all these rows, or has one for each of them.
    """
    names = ["row", "run_id", "architecture", "n_params", "tokens", "loss"]
    out = frame.loc[hit, [*names, "file"]].assign(code=code, reason=reason)[
        [*names, "code", "reason", "file"]
    ]
    listed = [Exclusion(*map(_number, cells)) for cells in out.itertuples(index=False, name=None)]
    return frame[~hit], listed


def _number(cell: Any) -> Any:
    return None if isinstance(cell, float) and math.isnan(cell) else cell


def too_few(frame: pd.DataFrame, law: Law) -> str:
    """Return why a law cannot be fitted to the rows of one architecture, or an empty string."""
    rows, wanted = [int(row) for row in frame["row"]], len(law.names)
    name = str(frame["architecture"].iloc[0])
    where = f"row {rows[0]}" if len(rows) == 1 else f"rows {min(rows)} to {max(rows)}"
    files = frame["file"].unique()
    where = f"{files[0]}: {where}" if len(files) == 1 else f"rows of {' and '.join(files[:2])}"
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
