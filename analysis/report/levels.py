"""Levels of a quantity: the values of a table that count as one, such as budgets that differ by rounding.

Colours, marks, lines and legends of all figures use these levels, so that equal budgets look equal.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.laws.law import Array

SAME = 1.02
"""Factor between the smallest and the largest value of one level: a per cent to either side of its middle."""
MOST = 8


@dataclass(frozen=True)
class Level:
    """The values from `low` to `high`; a line that stands for them is drawn at the value `at`."""

    at: float
    low: float
    high: float

    @property
    def single(self) -> bool:
        """True if the values differ by rounding only."""
        return self.high <= self.low * SAME

    def holds(self, values: Array) -> NDArray[np.bool_]:
        """Return True for the values of this level (points)."""
        found: NDArray[np.bool_] = (values >= self.low) & (values <= self.high)
        return found

    def within(self, values: Array) -> float:
        """Return the value at which a line through those of the values that lie in this level is drawn."""
        return self.at if self.single else float(values[self.holds(values)].max())


def levels(values: Array, most: int | None = MOST) -> list[Level]:
    """Return the levels of positive values (points) in ascending order, neighbours joined if they exceed `most`.

    A level begins at the first value more than SAME times the smallest of the level before. Its line is at its
    commonest value; that of joined levels at the highest of them.
    """
    distinct, counts = np.unique(values, return_counts=True)
    found, start = [], 0
    while start < len(distinct):
        end = int(np.searchsorted(distinct, distinct[start] * SAME, side="right"))
        # Of values that are equally common the middle one.
        common = start + np.flatnonzero(counts[start:end] == counts[start:end].max())
        at = float(distinct[common[len(common) // 2]])
        found.append(Level(at, float(distinct[start]), float(distinct[end - 1])))
        start = end
    if most is None or len(found) <= most:
        return found
    parts = [part for part in np.array_split(np.arange(len(found)), most) if len(part)]
    return [Level(found[part[-1]].at, found[part[0]].low, found[part[-1]].high) for part in parts]
