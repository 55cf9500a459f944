"""Sweeps of training settings: runs that differ in the learning rate or the batch alone are no seeds of each other.

The best of a sweep is the setting with the lowest mean loss over its seeds. A lowest of k losses lies below what one
run at that setting reaches again, by about 0.85 standard deviations of k = 3 equal settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from analysis.errors import InputError
from analysis.points.columns import CODEBOOK, known_columns
from analysis.points.note import Note
from analysis.text import architecture, human

if TYPE_CHECKING:
    import pandas as pd

SAME = 1.01
"""Sizes and budgets that differ by no more than this factor are one cell of a sweep, since settings can change both."""
SHOWN = 6
MOST_ROWS = 5


def settings_of(frame: pd.DataFrame) -> list[str]:
    """Return the columns of a Points frame that are settings of training."""
    own = {"row", "file", "state", "gaps", *known_columns()}
    return [name for name in frame.columns if name not in own and not CODEBOOK.fullmatch(name)]


def setting_named(name: str, frame: pd.DataFrame) -> str:
    """Return the column of a setting by its name or the last part of it; raises InputError."""
    settings = settings_of(frame)
    last = [one for one in settings if one.replace("/", ".").split(".")[-1] == name]
    if name not in settings and len(last) != 1:
        raise InputError(
            f"--best {name}: the table has no such setting of training; it has "
            f"{', '.join(settings) or 'none'} (name one with --column lr=NAME, or give the name of its column)."
        )
    return name if name in settings else last[0]


def cells_of(frame: pd.DataFrame) -> pd.Series[int]:
    """Number the architectures, sizes and budgets; those within the factor SAME of the smallest are one."""
    import pandas as pd

    size, budget = (np.log(frame[name].to_numpy(dtype=np.float64)) for name in ("n_params", "tokens"))
    kinds = pd.factorize(pd.MultiIndex.from_frame(frame[["architecture", "annealed"]]))[0]
    within = _levels(budget, _levels(size, kinds))
    return pd.Series(within, index=frame.index)


def _levels(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Number the values of each group from the smallest on; a level ends at SAME times its smallest value."""
    order = np.lexsort((values, groups))
    out = np.empty(len(values), dtype=np.int64)
    level, start, group = -1, -np.inf, None
    for i in order:
        if groups[i] != group or values[i] > start + np.log(SAME):
            level, start, group = level + 1, values[i], groups[i]
        out[i] = level
    return out


def best_of(
    frame: pd.DataFrame, best: Sequence[str], cells: pd.Series[int]
) -> tuple[pd.Series[str], list[Note]]:
    """Return why each row is not of the best setting of its cell, or an empty string, and notes on the choice.

    `best` are columns, as setting_named finds them; the other settings divide the `cells` further.
    """
    import pandas as pd

    chosen = list(best)
    others = [name for name in settings_of(frame) if name not in chosen]
    cells = frame.groupby([cells, *others], sort=False).ngroup()
    values = frame[chosen].agg(" and ".join, axis=1) if len(chosen) > 1 else frame[chosen[0]]
    mean = frame["loss"].groupby([cells, values]).transform("mean")
    lowest = mean.groupby(cells).transform("min")
    winner = values.where(mean == lowest).groupby(cells).transform("first")
    label = ", ".join(chosen)
    reasons = pd.Series("", index=frame.index, dtype=object)
    for index in frame.index[values != winner]:
        reasons[index] = (
            f"{label} {values[index]} has the mean loss {mean[index]:.5g}, and {winner[index]} the lowest of its size "
            f"and budget, {lowest[index]:.5g}"
        )
    tried = values.groupby(cells).nunique()
    arms = frame["architecture"].groupby(cells).first()
    kept = int((reasons == "").sum())
    text = (
        f"{kept} of {len(frame)} rows were kept: at each size and budget those of the best {label}, as requested; the "
        f"lowest of {_span(tried)} losses lies below what a run at that setting reaches again"
    )
    notes = [Note("best_selected", f"{text}.")]
    counts = tried.groupby(arms).mean()
    if counts.max() > 1.05 * counts.min():
        each = ", ".join(f"{architecture(str(name))} {count:.3g}" for name, count in counts.items())
        text = (
            f"the architectures had different numbers of candidates for {label} ({each} a size and budget): the lowest "
            "loss of more candidates is lower by chance alone."
        )
        notes.append(Note("selection_uneven", text))
    notes += [
        Note("best_at_edge", text) for name in chosen if (text := _at_edge(frame, name, cells, reasons == ""))
    ]
    return reasons, notes


def refuse_sweeps(frame: pd.DataFrame, cells: pd.Series[int]) -> None:
    """Raise InputError if the runs of one of the `cells` differ in a setting of training."""
    settings = settings_of(frame)
    varied = [name for name in settings if frame[name].nunique() > 1]
    if not varied:
        return
    several = {name: frame[name].groupby(cells).transform("nunique") > 1 for name in varied}
    named = [name for name, hit in several.items() if hit.any()]
    if not named:
        return
    cell = cells[several[named[0]]].iloc[0]
    rows = frame[cells == cell]
    numbers = [str(row) for row in rows["row"][:MOST_ROWS]] + ["..."] * (len(rows) > MOST_ROWS)
    first = rows.iloc[0]
    differ = " and ".join(f"{name} ({_values(rows[name])})" for name in named if rows[name].nunique() > 1)
    raise InputError(
        f"{first['file']}: rows {', '.join(numbers)} have one architecture, size and budget "
        f"({first['architecture']}, {human(first['n_params'])} parameters, {human(first['tokens'])} tokens) and differ "
        f"in {differ}: they are a sweep and no seeds; give --best {','.join(named)} to keep the best of each size and "
        f"budget, or choose by --where '{named[0]}={first[named[0]]}'."
    )


def differing_arms(frame: pd.DataFrame) -> list[Note]:
    """Return a note for each setting of training whose values differ between architectures."""
    notes = []
    for name in differing_settings(frame):
        each = "; ".join(
            f"{architecture(str(arm))} {_values(values)}"
            for arm, values in frame.groupby("architecture")[name]
        )
        text = f"the architectures differ in {name}: {each}; a difference in loss may be due to it."
        notes.append(Note("arms_differ", text))
    return notes


def differing_settings(frame: pd.DataFrame) -> list[str]:
    """Return the settings of training whose values differ between architectures."""
    by_arm = [rows for _, rows in frame.groupby("architecture")]
    return [name for name in settings_of(frame) if len({frozenset(rows[name]) for rows in by_arm}) > 1]


def _at_edge(frame: pd.DataFrame, name: str, cells: pd.Series[int], kept: pd.Series[bool]) -> str:
    """Say in how many cells the best value of a number is the smallest or largest tried, or return nothing."""
    import pandas as pd

    numbers = pd.to_numeric(frame[name], errors="coerce")
    if numbers.isna().any():
        return ""
    low, high = (numbers.groupby(cells).agg(end) for end in ("min", "max"))
    best = numbers[kept].groupby(cells[kept]).first()
    swept = high > low
    ends = swept & ((best == low) | (best == high))
    if not ends.any():
        return ""
    return (
        f"the best {name} is the smallest or largest that was tried in {int(ends.sum())} of {int(swept.sum())} sizes "
        "and budgets: a wider sweep may find a lower loss."
    )


def _span(counts: pd.Series[int]) -> str:
    low, high = int(counts.min()), int(counts.max())
    return str(low) if low == high else f"{low} to {high}"


def _values(column: pd.Series[str]) -> str:
    """Write the distinct values of a setting, numbers in their order."""

    def key(text: str) -> tuple[float, str]:
        try:
            return float(text), ""
        except ValueError:
            return np.inf, text

    values = sorted(set(column), key=key)
    shown = [value or "empty" for value in values[:SHOWN]]
    return ", ".join(shown) + (f" and {len(values) - SHOWN} more" if len(values) > SHOWN else "")
