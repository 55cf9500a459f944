"""The exponent of the compute-optimal size in compute, from the optima of several budgets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from analysis.fitting.bootstrap import interval
from analysis.laws.law import Array, Interval

FEWEST_DRAWS = 50  # resamples of an interval
CLOSED = 0.95  # least share of the resamples that give an exponent, for an interval


@dataclass(frozen=True)
class Exponent:
    """N_opt is proportional to C^value; `reason` says why there is no 95 % interval, or what limits the value."""

    value: float
    ci95: Interval | None
    budgets: int
    reason: str = ""


def power_law(x: Array, y: Array, log_sd: Array | None = None) -> tuple[float, float]:
    """Return a and c of y = c x^a by least squares in logarithms, weighted by 1/log_sd^2."""
    root = np.ones(len(x)) if log_sd is None else 1.0 / np.asarray(log_sd)
    design = np.column_stack([np.log(x), np.ones(len(x))])
    slope, offset = np.linalg.lstsq(design * root[:, None], np.log(y) * root, rcond=None)[0]
    return float(slope), float(np.exp(offset))


def exponent_of(flops: Array, sizes: Array, drawn: Array | None, reason: str = "") -> Exponent:
    """Fit the exponent to sizes at FLOPs (budgets), and its interval to log sizes drawn (budgets, resamples).

    A budget's weight falls with the spread of its draws, so that a flat rung does not decide; no weight exceeds that of
    a budget without spread by more than the median spread allows. A draw uses the budgets that have an optimum in it.
    """
    if drawn is None:
        return Exponent(power_law(flops, sizes)[0], None, len(flops), reason)
    sd = np.array([_spread(one) for one in drawn])
    typical = float(np.median(sd[np.isfinite(sd)])) if np.isfinite(sd).any() else 0.0
    log_sd = np.hypot(np.where(np.isfinite(sd), sd, 1e3), typical) if typical > 0 else np.ones(len(sd))
    value, _ = power_law(flops, sizes, log_sd)
    there = np.isfinite(drawn)
    weight = there / log_sd[:, None] ** 2
    total = weight.sum(axis=0)
    usable = there.sum(axis=0) >= 2
    weight, total, y = weight[:, usable], total[usable], np.where(there, drawn, 0.0)[:, usable]
    x = np.log(flops)[:, None]
    x = x - (weight * x).sum(axis=0) / total
    slopes = (weight * x * y).sum(axis=0) / (weight * x * x).sum(axis=0)
    if len(slopes) < max(FEWEST_DRAWS, CLOSED * drawn.shape[1]):
        why = f"only {len(slopes)} of {drawn.shape[1]} resamples have optima at two budgets"
        return Exponent(value, None, len(flops), "; ".join(one for one in (reason, why) if one))
    return Exponent(value, interval(slopes), len(flops), reason)


def _spread(drawn: Array) -> float:
    """Return the normal standard deviation with the same quartiles; infinite with few draws."""
    finite = drawn[np.isfinite(drawn)]
    if len(finite) < 0.5 * len(drawn) or len(finite) < FEWEST_DRAWS:
        return float("inf")
    low, high = np.percentile(finite, [25, 75])
    return float((high - low) / 1.349)
