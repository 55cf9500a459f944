"""Profiles: the objective minimised over all other parameters at fixed values of one.

A flat profile shows that the points do not identify the parameter, however precise its estimate looks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from analysis.fitting.scale import robust_scale
from analysis.fitting.solver import FitResult, Problem, limits, minimise
from analysis.laws.law import Array

HUMPS = 3  # rounds of further descents at humps
POINTS = 25  # values of a profile
CHI_SQUARED = 3.841  # 95 % quantile with one degree of freedom
REACH = 8.0  # factor by which a profile extends below and above the estimate


@dataclass(frozen=True)
class Profile:
    """The objective minimised over all other parameters at fixed values of one, in the law's own units.

    Inside `interval` the objective is at most `allowed`, its nominal 95 % limit, which counts rows as independent. That
    width is optimistic: an end that is open (None) all the same shows a flat valley.
    """

    values: tuple[float, ...]
    objective: tuple[float, ...]
    allowed: float
    interval: tuple[float | None, float | None]


def profile(problem: Problem, result: FitResult, name: str) -> Profile:
    """Profile E over [0, lowest loss], or another parameter over a factor of eight or more to either side.

    A coefficient is profiled in the law's own units, where its input is not centred.
    """
    law = problem.law
    j = law.names.index(name)
    starts = result.rivals
    low, high = limits(problem)
    top = float(np.exp(problem.y.max()))
    if name in law.scaled:
        column, exponent = law.scaled[name]
        public = law.to_public(starts, problem.centre)
        shift = float(problem.centre[law.columns.index(column)])
        centre = law.uncentred(problem.centre, column)
        problem = replace(problem, z=problem.z + problem.centre - centre, centre=centre)
        starts = law.to_solver(public, centre)
        estimate = max(float(starts[0, j]), 1e-6 * top)
        # At least eightfold, and as far as the exponent moves it between half and twice its own estimate.
        swing = abs(shift) * float(starts[0, law.names.index(exponent)])
        below, above = max(np.log(REACH), 0.5 * swing), max(np.log(REACH), swing)
        values = np.unique(np.append(estimate * np.exp(np.linspace(-below, above, POINTS)), estimate))
        # The exponent that keeps the term unchanged at the middle of the points.
        moved = np.repeat(starts[:, None], len(values), axis=1)
        moved[:, :, law.names.index(exponent)] += np.log(values / estimate) / (shift or 1.0)
    else:
        estimate = float(result.u[j])
        if name == "E":
            values = np.linspace(0.0, float(np.exp(problem.y.min())) * 0.999, POINTS)
        else:
            values = np.geomspace(max(low[j], estimate / REACH), min(high[j], estimate * REACH), POINTS)
        values = np.unique(np.append(values, np.clip(estimate, low[j], high[j])))
        moved = np.repeat(starts[:, None], len(values), axis=1)
    _, reached = profiled(problem, name, values, moved)
    allowed = float(reached.min()) + _allowance(problem, starts[0])
    ends = _crossing(values[::-1], reached[::-1], allowed), _crossing(values, reached, allowed)
    return Profile(tuple(values.tolist()), tuple(reached.tolist()), allowed, ends)


def profiled(problem: Problem, name: str, values: Array, starts: Array) -> tuple[Array, Array]:
    """Return the best parameters (values, parameters) and objective (values) with parameter `name` held at each value.

    `starts` are (starts, values, parameters), in the solver's terms.
    """
    j = problem.law.names.index(name)
    low, high = limits(problem)
    lows, highs = np.tile(low, (len(values), 1)), np.tile(high, (len(values), 1))
    lows[:, j] = highs[:, j] = values
    y, w = problem.copies(len(values))
    best, reached = starts[0].copy(), np.full(len(values), np.inf)

    def descend(start: Array, rows: NDArray[np.int64], steps: int) -> None:
        found = minimise(
            problem, y[rows], w[rows], start, lows[rows], highs[rows], max_iter=steps, tolerance=1e-8
        )
        better = found.objective < reached[rows]
        best[rows[better]] = found.u[better]
        reached[rows[better]] = found.objective[better]

    everywhere = np.arange(len(values))
    for start in starts:
        descend(start, everywhere, 40)
    # Start from a neighbour's solution, which a batch cannot use within one sweep.
    for side in (1, -1):
        descend(np.roll(best, side, axis=0), everywhere, 40)
    # At a hump between two neighbours the descent ended in a side valley, or too early.
    for _ in range(HUMPS):
        humps = 1 + np.flatnonzero((reached[1:-1] > reached[:-2]) & (reached[1:-1] > reached[2:]))
        if not len(humps):
            break
        for side in (-1, 0, 1):
            descend(best[humps + side], humps, 200)
    return best, reached


def _crossing(values: Array, objective: Array, allowed: float) -> float | None:
    """Return where the objective last rises above `allowed`, linear between neighbours; None if it never does."""
    last = int(np.flatnonzero(objective <= allowed)[-1])
    if last == len(values) - 1:
        return None
    share = (allowed - objective[last]) / (objective[last + 1] - objective[last])
    return float(values[last] + share * (values[last + 1] - values[last]))


def _allowance(problem: Problem, u: Array) -> float:
    """Return by how much the objective may rise above the optimum inside a nominal 95 % interval.

    Under normal noise twice the rise, times E psi' / E psi^2, is chi-squared with one degree of freedom (Heritier and
    Ronchetti 1994, doi 10.1080/01621459.1994.10476822). E psi' is the share of normal noise of the residuals' robust
    scale within delta.
    """
    free = len(problem.law.names) - len(problem.held)
    residual = (np.log(problem.law.predict(u[None], problem.z)[0]) - problem.y)[problem.weight > 0]
    scale = robust_scale(residual, free)
    if scale <= 0:
        return 0.0
    inside = math.erf(problem.delta / (math.sqrt(2) * scale))
    squares = float((np.clip(residual, -problem.delta, problem.delta) ** 2).sum()) / max(
        1, len(residual) - free
    )
    return 0.5 * CHI_SQUARED * squares / inside
