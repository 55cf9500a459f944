"""Errors on points left out of a fit: the largest sizes, the longest budgets, the largest compute.

In-sample error says little about extrapolation (0.25 % against -3.8 % on the OLMo ladder). The largest compute is the
hardest split and the one that decides between laws: it leaves out what a study trains last, where size and data are
large together. A law that the residuals reject is wrong by more than its resamples show: its error there measures
by how much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.fitting.scale import robust_scale
from analysis.fitting.shared_e import fit_shared
from analysis.fitting.solver import Problem, Status, fit_law
from analysis.laws.law import Array, Law

# Above so many distinct values the top fifth of the rows is left out instead of the top value.
MAX_VALUES = 10
TOP_SHARE = 0.8
SAME_COMPUTE, WIDEST_RUNG = 1.2, 1.5
"""Neighbouring budgets of one rung differ by less than the first factor, all of them by less than the second."""
FEWEST_VALUES = 3  # sizes, and budgets, that determine a law
FAR = 10.0  # robust deviations from which on an error is that of a diverged run
FAR_ERROR = 0.01


@dataclass(frozen=True)
class Split:
    """Rows left out at and above `threshold`, the fit of the rest, and its predictions for them."""

    threshold: float
    left_out: NDArray[np.bool_]
    predicted: Array  # nats, one for each row left out
    relative_error: Array  # (predicted - observed) / observed
    status: Status
    determined: bool  # True if the rest has at least three sizes and three budgets


@dataclass(frozen=True)
class Drift:
    """Error of a rejected law beyond its points: root mean square `error` of the log loss at a distance of `reach`.

    The distance is that of ln(size x data) beyond the largest fitted one.
    """

    error: float
    reach: float

    def at(self, distance: float) -> float:
        """Return the deviation of the log loss at a distance beyond the points; it grows in proportion."""
        return self.error * max(0.0, distance) / self.reach


def held_out(
    law: Law, x: Array, loss: Array, delta: float, column: int, others: Sequence[Problem] = ()
) -> Split | None:
    """Leave out the highest values of input `column`, fit the rest and predict; None if too little is left to fit.

    `others` are architectures that share a parameter; all their points are fitted together with the rest.
    """
    values = np.unique(x[:, column])
    if len(values) < 2:
        return None
    threshold = (
        float(values[-1]) if len(values) <= MAX_VALUES else float(np.quantile(x[:, column], TOP_SHARE))
    )
    return without(law, x, loss, delta, x[:, column], threshold, others)


def held_out_compute(
    law: Law, x: Array, loss: Array, delta: float, compute: Array, others: Sequence[Problem] = ()
) -> Split | None:
    """Leave out the points of the largest compute (points, in FLOPs), fit the rest and predict.

    Of points on rungs (`compute_rungs`) the top one is left out, of others the top fifth of the points, and less of it
    where the rest would not determine the law. None if too little is left to fit.
    """
    values = np.unique(compute)
    if len(values) < 2:
        return None
    rungs = compute_rungs(compute)
    first = rungs[-1] if len(rungs) > 1 else float(np.quantile(compute, TOP_SHARE))
    for threshold in (first, *values[values > first]):
        if determines(law, x[compute < threshold]):
            return without(law, x, loss, delta, compute, float(threshold), others)
    return without(law, x, loss, delta, compute, first, others)


def compute_rungs(compute: Array) -> list[float]:
    """Return the least compute of each rung in ascending order; none if the points are on no rungs.

    The budgets of a rung lie close together: real ones vary by a tenth. A grid of sizes and budgets has no rungs, since
    its compute spreads, and few points share one.
    """
    ascending = np.sort(compute)
    parts = np.split(ascending, 1 + np.flatnonzero(np.diff(np.log(ascending)) > np.log(SAME_COMPUTE)))
    on_rungs = all(len(part) >= FEWEST_VALUES and part[-1] < WIDEST_RUNG * part[0] for part in parts)
    return [float(part[0]) for part in parts] if on_rungs and len(parts) <= MAX_VALUES else []


def determines(law: Law, x: Array) -> bool:
    """True if inputs x (points, inputs) have three values of each axis and more points than the law has parameters."""
    enough = all(len(np.unique(x[:, j])) >= FEWEST_VALUES for j in law.axes)
    return enough and len(x) > len(law.names)


def without(
    law: Law, x: Array, loss: Array, delta: float, by: Array, threshold: float, others: Sequence[Problem] = ()
) -> Split | None:
    """Fit the points whose value of `by` is below `threshold`, and predict the others; None if there are too few."""
    out = by >= threshold
    rest = ~out
    if rest.sum() < 2:
        return None
    problem = Problem.of(law, x[rest], loss[rest], delta)
    result = fit_shared([problem, *others]).result_of(0) if others else fit_law(problem)
    predicted = law.predict(result.u[None], law.centred(x[out], problem.centre))[0]
    return Split(
        threshold=threshold,
        left_out=out,
        predicted=predicted,
        relative_error=predicted / loss[out] - 1.0,
        status=result.status,
        determined=all(len(np.unique(x[rest][:, j])) >= FEWEST_VALUES for j in law.axes),
    )


def drift_of(split: Split | None, by: Array) -> Drift | None:
    """Return the error of a law on the largest compute, without diverged runs; None if none could be left out.

    `by` is ln(size x data) of all points.
    """
    if split is None:
        return None
    error = np.log1p(split.relative_error)
    kept = ~far_off(error)
    reach = float(np.mean(np.maximum(by[split.left_out] - by[~split.left_out].max(), 0.0)))
    if not kept.any() or reach <= 0:
        return None
    return Drift(float(np.sqrt(np.mean(error[kept] ** 2))), reach)


def far_off(error: Array) -> NDArray[np.bool_]:
    """Return a mask of the errors (points) of diverged runs: above ten robust deviations, and above one per cent."""
    size = np.abs(error)
    out: NDArray[np.bool_] = (size > FAR * robust_scale(error)) & (size > FAR_ERROR)
    return out
