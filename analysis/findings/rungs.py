"""Budgets of compute at which several sizes were trained: as they were trained, or interpolated from curves.

Budgets of real campaigns miss their target by some 10 %, so rungs are clusters of log FLOPs. A cluster counts if it is
narrow, and narrower than the gap to its neighbours; most points must lie in such clusters. A grid of sizes and lengths
whose products fill the range has none: there the curve of each size is interpolated to a common budget.

A rung only says which points carry which size with which share. Its log losses are those of the fitted law at the
rung's own FLOPs plus the shares of the points' residuals, so that a budget missed by 10 %, or two neighbours far apart
on a curve, cost no more than the law's error over that distance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from analysis.findings.curve import spaced
from analysis.laws.law import Array

Method = Literal["equal_flops", "interpolated"]
Rows = NDArray[np.int64]

FEWEST = 4  # sizes of a parabola with a residual
NEAR = 0.05  # width in ln N of sizes, and in ln C of budgets of one size, that count as one
WIDEST = 0.45  # width of a rung in ln C: budgets missed by 22 % either way
GAPS = np.geomspace(WIDEST, 0.01, 15)  # gaps in ln C that may separate rungs
IN_RUNGS = 0.5  # least share of the points in rungs of a table that held compute equal
MAX_BUDGETS = 200  # budgets of which optima are estimated
LEVELS = 10  # budgets to which curves are interpolated


@dataclass(frozen=True)
class Rung:
    """One budget: log sizes in ascending order, and the points' rows, each with its size's place and its share."""

    log_flops: float
    log_sizes: Array
    rows: Rows
    place: Rows
    share: Array

    def at_sizes(self, values: Array) -> Array:
        """Return the mean (sizes) of values (rows) by their shares."""
        return np.bincount(self.place, self.share * values, len(self.log_sizes)).astype(np.float64)


def rungs_of(log_size: Array, log_flops: Array) -> tuple[list[Rung], Method]:
    """Return the budgets with enough sizes of points (points), at most 200, the smallest first."""
    trained = _clusters(log_size, log_flops)
    if len(trained) >= 2:
        method: Method = "equal_flops"
        rungs = [_as_trained(log_size, log_flops, trained[i]) for i in spaced(len(trained), MAX_BUDGETS)]
    else:
        rungs, method = _interpolated(log_size, log_flops), "interpolated"
    return rungs, method


def _clusters(log_size: Array, log_flops: Array) -> list[Rows]:
    """Return the rows of each rung as trained; none unless most points lie in rungs."""
    order = np.argsort(log_flops, kind="stable")
    x = log_flops[order]
    step = np.diff(x)
    most, best = IN_RUNGS * len(x), []
    for least in GAPS:
        cuts = np.flatnonzero(step > least)
        starts, ends = np.r_[0, cuts + 1], np.r_[cuts, len(x) - 1]
        between = np.r_[np.inf, step[cuts], np.inf]
        width = x[ends] - x[starts]
        apart = (width <= WIDEST) & (width < np.minimum(between[:-1], between[1:]))
        enough = np.flatnonzero(apart & (ends - starts + 1 >= FEWEST))
        found = [order[starts[i] : ends[i] + 1] for i in enough]
        found = [rows for rows in found if near(log_size[rows]).max() + 1 >= FEWEST]
        held = sum(len(rows) for rows in found)
        if held > most:
            most, best = held, found
        if most == len(x):
            break
    return best


def _as_trained(log_size: Array, log_flops: Array, rows: Rows) -> Rung:
    place = near(log_size[rows])
    share = 1.0 / np.bincount(place)[place]
    log_sizes = np.bincount(place, share * log_size[rows]).astype(np.float64)
    return Rung(float(log_flops[rows].mean()), log_sizes, rows, place, share)


@dataclass(frozen=True)
class _Line:
    """The points of one size: its log size, the log FLOPs of its budgets, and the rows of each."""

    log_size: float
    levels: Array
    rows: list[Rows]

    def covers(self, level: Array | float) -> Array:
        """Return True for each level between the size's budgets."""
        out: Array = (self.levels[0] - 1e-9 <= level) & (level <= self.levels[-1] + 1e-9)
        return out

    def at(self, level: float) -> tuple[Rows, Array]:
        """Return the rows on either side of a level, and shares that are linear in ln C."""
        right = int(np.clip(np.searchsorted(self.levels, level), 1, len(self.levels) - 1))
        before, after = self.levels[right - 1 : right + 1]
        share = float(np.clip((level - before) / (after - before), 0.0, 1.0))
        sides = ((self.rows[right - 1], 1.0 - share), (self.rows[right], share))
        shares = [np.full(len(rows), part / len(rows)) for rows, part in sides]
        return np.concatenate([rows for rows, _ in sides]), np.concatenate(shares)


def _interpolated(log_size: Array, log_flops: Array) -> list[Rung]:
    lines = []
    for rows in _grouped(np.arange(len(log_size)), near(log_size)):
        own = _grouped(rows, near(log_flops[rows]))
        levels = np.array([log_flops[part].mean() for part in own])
        if len(levels) > 1:
            lines.append(_Line(float(log_size[rows].mean()), levels, own))
    if len(lines) < FEWEST:
        return []
    lowest, highest = min(line.levels[0] for line in lines), max(line.levels[-1] for line in lines)
    grid = np.linspace(lowest, highest, 200)
    covered = grid[np.sum([line.covers(grid) for line in lines], axis=0) >= FEWEST]
    if not len(covered) or covered[-1] < covered[0] + np.log(2):
        return []
    rungs = []
    for level in np.linspace(covered[0], covered[-1], LEVELS):
        there = [line for line in lines if line.covers(level)]
        if len(there) >= FEWEST:
            sides = [line.at(float(level)) for line in there]
            place = np.repeat(np.arange(len(there)), [len(rows) for rows, _ in sides])
            log_sizes = np.array([line.log_size for line in there])
            rows, share = (np.concatenate(parts) for parts in zip(*sides, strict=True))
            rungs.append(Rung(float(level), log_sizes, rows, place, share))
    return rungs


def near(values: Array) -> Rows:
    """Return each value's group, numbered from the lowest; a group spans at most `NEAR`."""
    order = np.argsort(values, kind="stable")
    x = values[order]
    number = np.zeros(len(x), dtype=np.int64)
    end = int(np.searchsorted(x, x[0] + NEAR, side="right"))
    while end < len(x):
        number[end:] += 1
        end = int(np.searchsorted(x, x[end] + NEAR, side="right"))
    out = np.empty_like(number)
    out[order] = number
    return out


def _grouped(rows: Rows, which: Rows) -> list[Rows]:
    """Split rows by the number of their group, each in their order."""
    return np.split(rows[np.argsort(which, kind="stable")], np.cumsum(np.bincount(which))[:-1])
