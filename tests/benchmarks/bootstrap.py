"""Refits of cluster resamples, all at once, against one warm BFGS descent each.

The baseline starts every refit at the point estimate, as is usual, with an analytic gradient over one array. Both sides
refit the same draws, so that their intervals can be compared.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy.optimize import minimize

from analysis.fitting.bootstrap import Fitted, cluster_keys, interval, refit
from analysis.fitting.solver import Problem, fit_law
from analysis.laws.catalogue import CHINCHILLA
from analysis.laws.law import Array
from tests.benchmarks.fit import DELTA, LogSumExp, synthetic_points
from tests.benchmarks.measure import Row, clocked, times

RESAMPLES = 4000
ENOUGH_FOR_A_RATE = 200
SAME = 0.05  # share of an interval's width by which its ends may differ


def run(*, quick: bool) -> Iterator[Row]:
    """Yield the time of all refits against as many descents, and the intervals of both."""
    fit, log_x = _fitted()
    clusters = len(fit.keys)
    drawn = np.random.default_rng(0).multinomial(clusters, np.full(clusters, 1 / clusters), size=RESAMPLES)
    draws = drawn[:, fit.cluster].astype(np.float64)
    y = np.tile(fit.problem.y, (RESAMPLES, 1))
    count = ENOUGH_FOR_A_RATE if quick else RESAMPLES
    ours: list[Array] = []
    theirs: list[Array] = []
    fast = clocked(lambda: ours.append(refit(fit, len(y), lambda rows: (y[rows], draws[rows]))))
    slow = clocked(lambda: theirs.append(_descend(fit, log_x, draws[:count]))) / count
    timed = "" if count == RESAMPLES else f" ({count} descents tried)"
    what = f"bootstrap: {RESAMPLES} refits of {len(fit.problem.y)} points{timed}"
    yield times(what, np.array([fast]), np.array([slow * RESAMPLES]))
    public = fit.problem.law.to_public(ours[0], fit.problem.centre)
    yield from _intervals(public[:count], theirs[0])


def _fitted() -> tuple[Fitted, Array]:
    x, loss = synthetic_points()
    series = np.arange(len(x)) % 3  # three series a size, of four budgets each
    names = [f"{size:.0f}-{number}" for size, number in zip(x[:, 0], series, strict=True)]
    problem = Problem.of(CHINCHILLA, x, loss, DELTA)
    cluster, keys = cluster_keys(x[:, 0], series.astype(np.float64), names)
    return Fitted("any", problem, fit_law(problem), cluster, keys, x[:, 0]), np.log(x)


def _descend(fit: Fitted, log_x: Array, draws: Array) -> Array:
    """Descend from the point estimate on each draw; returns (resamples, parameters in the law's order)."""
    params = fit.result.params
    start = np.array([*(np.log(params[name]) for name in ("A", "B", "E")), params["alpha"], params["beta"]])
    ends = []
    for weights in draws:
        objective = LogSumExp(log_x, fit.problem.y, weights)
        ends.append(minimize(objective, start, jac=True, method="BFGS", options={"gtol": 1e-8}).x)
    end = np.array(ends)
    return np.column_stack([np.exp(end[:, [2, 0, 1]]), end[:, 3:]])


def _intervals(ours: Array, theirs: Array) -> Iterator[Row]:
    for name in ("alpha", "beta"):
        column = CHINCHILLA.names.index(name)
        low, high = interval(ours[:, column])
        their_low, their_high = interval(theirs[:, column])
        apart = max(abs(low - their_low), abs(high - their_high)) / (their_high - their_low)
        if apart > SAME:
            raise AssertionError(
                f"the intervals of {name} differ: [{low}, {high}], [{their_low}, {their_high}]"
            )
        yield Row(
            f"bootstrap: 95 % interval of {name}",
            f"{low:.4f}..{high:.4f}",
            f"{their_low:.4f}..{their_high:.4f}",
            f"ends differ by at most {apart:.1%} of its width",
        )
