"""Losses at equal compute: the points of each budget, carried to its FLOPs, and a parabola through them.

A budget missed by a tenth costs nothing, since the fitted law carries each loss: at the rung's FLOPs it is the law's
there plus the point's own residual, so that of the law only the difference between the two budgets enters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from analysis.findings.curve import Curve
from analysis.findings.notes import OUTLIER_DEVIATIONS, OUTLIER_RESIDUAL
from analysis.findings.parabola import Parabola, noise_of
from analysis.findings.rungs import Method, Rung, rungs_of
from analysis.fitting.scale import robust_scale
from analysis.laws.law import Array

TINY = 1e-300
DRAWS = 300  # resampled laws whose optima make an interval


@dataclass(frozen=True)
class Budget:
    """One budget: a parabola, the log losses (rows) of its rung as seen, and those of the law and its resamples.

    `by_law` (problems, rows) has the estimate first; `deviation` (resamples, rows) is what a resample adds to the seen.
    """

    parabola: Parabola
    values: Array
    by_law: Array
    deviation: Array


@dataclass(frozen=True)
class EqualCompute:
    """The budgets of a curve; `curve` lacks the outliers, whose run ids are `left_out`."""

    curve: Curve
    method: Method
    budgets: tuple[Budget, ...]
    left_out: tuple[str, ...]

    @property
    def rungs(self) -> list[Rung]:
        """Rungs of the budgets, the smallest first."""
        return [one.parabola.rung for one in self.budgets]


def equal_compute(curve: Curve, resampled: Array) -> EqualCompute:
    """Find the budgets at which losses compare, by the points that are no outliers; none for a law without data.

    `resampled` are log losses (resamples, points) for the intervals, the points in the order of the curve's frame.
    """
    usable = _near_the_law(curve)
    left_out = tuple(str(one) for one in curve.frame.loc[~usable, "run_id"])
    curve, resampled = replace(curve, frame=curve.frame[usable]), resampled[:, usable]
    size = curve.frame["n_params"].to_numpy(dtype=np.float64)
    rungs, method = rungs_of(np.log(size), np.log(curve.flops))
    if curve.law.size is None or curve.law.data is None or not rungs:
        return EqualCompute(curve, method, (), left_out)
    points = _CarriedLosses(curve, resampled)
    losses = [points.of(rung) for rung in rungs]
    parabolas = [Parabola.about_the_minimum(rung, one[0]) for rung, one in zip(rungs, losses, strict=True)]
    noise = noise_of([one.misfit(own[0]) for one, own in zip(parabolas, losses, strict=True)])
    budgets = [
        Budget(parabola, *losses[i], points.drawn(parabola.rung, None if noise is None else float(noise[i])))
        for i, parabola in enumerate(parabolas)
    ]
    return EqualCompute(curve, method, tuple(budgets), left_out)


def _near_the_law(curve: Curve) -> NDArray[np.bool_]:
    """Return a mask of the points that are no outliers by the rule of the notes."""
    off = np.abs(np.log(curve.frame["loss"].to_numpy(dtype=np.float64)) - np.log(curve.loss_of(curve.frame)))
    scale = robust_scale(off, len(curve.law.names))
    out: NDArray[np.bool_] = off <= max(OUTLIER_DEVIATIONS * scale, OUTLIER_RESIDUAL)
    return out


class _CarriedLosses:
    """The log losses of a curve's points, carried to the FLOPs of a rung, as trained and in each resample."""

    def __init__(self, curve: Curve, resampled: Array) -> None:
        """Take log losses `resampled` (resamples, points) in the order of the frame."""
        fitted = np.log(curve.loss_of(curve.frame))
        self._residual = np.log(curve.frame["loss"].to_numpy(dtype=np.float64)) - fitted
        self._deviation = resampled - fitted
        self._spread = np.sqrt(np.mean(self._deviation**2, axis=0))
        self._curve, self._log_x = curve, np.log(curve.law.x(curve.frame))
        self._axis = next(j for j, one in enumerate(curve.law.inputs) if one.axis == "data")
        self._log_flops = np.log(curve.flops)

    def of(self, rung: Rung) -> tuple[Array, Array]:
        """Return log losses (rows) of a rung's points, had they been trained for its FLOPs: seen, and of the laws.

        The latter are those of the estimate and the resamples (problems, rows).
        """
        z = self._log_x[rung.rows]
        z[:, self._axis] += rung.log_flops - self._log_flops[rung.rows]
        by_law = np.log(self._curve.law.predict(self._curve.params[: DRAWS + 1], z))
        return by_law[0] + self._residual[rung.rows], by_law

    def drawn(self, rung: Rung, noise: float | None) -> Array:
        """Return deviations of a rung's points in each resample (resamples, rows).

        With a `noise` each point has that standard deviation, and keeps its sign in the resample: points of one series
        go on deviating together. Without one each keeps its own residual from the law.
        """
        own = self._deviation[:, rung.rows]
        return own if noise is None else own * (noise / np.maximum(self._spread[rung.rows], TINY))
