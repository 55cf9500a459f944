"""FLOPs a token as a smooth rising function of size, fitted to the points' own counts.

Counts scatter: equal sizes have other shapes or contexts, and attention costs what no power law of N gives. At equal
compute an optimal size depends on the slope of ln(FLOPs/token) in ln N, and the slope between two neighbouring points
is mostly scatter. So the slope is a curve of few knots, its roughness is penalised (P-splines: Eilers and Marx 1996,
doi 10.1214/ss/1038425655), and generalised cross-validation over all sizes chooses the penalty.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from analysis.laws.law import Array, Interval

KNOTS = 8
PENALTIES = np.logspace(-6, 5, 23)
# Each effective parameter counts 1.4 times (Kim and Gu 2004, doi 10.1046/j.1369-7412.2003.05316.x): plain
# cross-validation of few points follows noise.
INFLATION = 1.4
EXACT = 1e-6  # difference of log FLOPs a token that is rounding
STEADY: Interval = (0.5, 1.5)
"""Bounds of the slope of ln(FLOPs/token) in ln N outside the sizes of the points."""


@dataclass(frozen=True)
class LogRate:
    """Log FLOPs a token at log sizes: a rising curve between `low` and `high`, straight lines outside."""

    low: float
    high: float
    level: float  # at `low`
    slopes: Array  # at evenly spaced knots from `low` to `high`
    outside: Interval  # slopes below `low` and above `high`

    def __call__(self, at: Array) -> Array:
        """Return log FLOPs a token at log sizes, of any shape."""
        knots, below, above = len(self.slopes), *self.outside
        if knots == 1:
            out: Array = self.level + self.slopes[0] * (at - self.low)
            return out
        step = (self.high - self.low) / (knots - 1)
        along = np.clip((at - self.low) / step, 0.0, knots - 1.0)
        piece = np.minimum(along.astype(np.int64), knots - 2)
        rest = along - piece
        first, bend = self.slopes[piece], 0.5 * np.diff(self.slopes)[piece]
        out = self._levels[piece] + step * rest * (first + bend * rest)
        return out + below * np.minimum(at - self.low, 0.0) + above * np.maximum(at - self.high, 0.0)

    @cached_property
    def _levels(self) -> Array:
        """Values at the knots."""
        step = (self.high - self.low) / (len(self.slopes) - 1)
        out: Array = self.level + np.r_[0.0, np.cumsum(0.5 * step * (self.slopes[:-1] + self.slopes[1:]))]
        return out


def log_rate_of(size: Array, rate: Array) -> LogRate:
    """Fit log FLOPs a token to sizes (points) and FLOPs a token (points), which are positive and in any order.

    Equal sizes count as their median. Outside the sizes the line has the mean slope of the nearer half of the curve,
    at least .5 and at most 1.5. One size alone gives FLOPs in proportion to size.
    """
    values, which = np.unique(np.log(size), return_inverse=True)
    order = np.lexsort((np.log(rate), which))
    logs, count = np.log(rate)[order], np.bincount(which)
    first = np.cumsum(count) - count
    y = 0.5 * (logs[first + (count - 1) // 2] + logs[first + count // 2])
    low, high = float(values[0]), float(values[-1])
    if len(values) == 1:
        return LogRate(low, high, float(y[0]), np.ones(1), (1.0, 1.0))
    knots = min(KNOTS, len(values))
    level, slopes = _smooth(_rise(values - low, high - low, knots), y)
    curve = LogRate(low, high, level, slopes, (1.0, 1.0))
    start, middle, end = curve(np.array([low, 0.5 * (low + high), high]))
    half = 0.5 * (high - low)
    outside = tuple(float(np.clip(rise / half, *STEADY)) for rise in (middle - start, end - middle))
    return LogRate(low, high, level, slopes, (outside[0], outside[1]))


def _rise(along: Array, width: float, knots: int) -> Array:
    """Return the integrals from 0 of the hat functions of evenly spaced knots (sizes, knots)."""
    step = width / (knots - 1)
    x = np.clip(along[:, None] / step - np.arange(knots), -1.0, 1.0)
    out: Array = step * np.where(x < 0, 0.5 * (1 + x) ** 2, 1 - 0.5 * (1 - x) ** 2)
    out[:, 0] -= 0.5 * step  # its hat begins half a step before the range
    return out


def _smooth(basis: Array, y: Array) -> tuple[float, Array]:
    """Return the level and the slopes at the knots that fit y (sizes), none of the slopes below 0."""
    design = np.column_stack([np.ones(len(y)), basis])
    rough = np.zeros((basis.shape[1] - 1, design.shape[1]))
    rough[:, 1:] = np.diff(np.eye(basis.shape[1]), axis=0)
    gram, moment, roughness = design.T @ design, design.T @ y, rough.T @ rough
    best = np.inf
    for penalty in PENALTIES:
        smoother = np.linalg.solve(gram + penalty * roughness, np.column_stack([gram, moment]))
        left = y - design @ smoother[:, -1]
        freedom = len(y) - INFLATION * np.trace(smoother[:, :-1])
        score = (left @ left / len(y) + EXACT**2) / freedom**2 if freedom > 0 else np.inf
        if score <= best:  # of equals the smoothest; the straight line of two sizes
            best, chosen, found = score, penalty, smoother[:, -1]
    if (found[1:] < 0).any():
        from scipy.optimize import lsq_linear

        system = np.vstack([design, np.sqrt(chosen) * rough])
        target = np.concatenate([y, np.zeros(len(rough))])
        found = lsq_linear(system, target, (np.r_[-np.inf, np.zeros(basis.shape[1])], np.inf)).x
    return float(found[0]), np.maximum(found[1:], 0.0)
