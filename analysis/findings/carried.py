"""Losses carried to a common budget by the fitted law, so that a budget missed by a tenth costs nothing.

A point's loss at the rung's FLOPs is the law's there plus the point's own residual: of the law only the difference
between the two budgets enters.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from analysis.findings.curve import Curve
from analysis.findings.notes import OUTLIER_DEVIATIONS, OUTLIER_RESIDUAL
from analysis.findings.rungs import Rung
from analysis.laws.law import Array

NORMAL = 1.4826  # standard deviations in the median absolute value of normal noise
TINY = 1e-300


def near_the_law(curve: Curve) -> NDArray[np.bool_]:
    """Return a mask of the points that are no outliers by the rule of the notes."""
    off = np.abs(np.log(curve.frame["loss"].to_numpy(dtype=np.float64)) - np.log(curve.loss_of(curve.frame)))
    out: NDArray[np.bool_] = off <= max(OUTLIER_DEVIATIONS * NORMAL * float(np.median(off)), OUTLIER_RESIDUAL)
    return out


class CarriedLosses:
    """The log losses of a curve's points, carried to the FLOPs of a rung, as trained and in each resample."""

    def __init__(self, curve: Curve, resampled: Array, draws: int) -> None:
        """Take log losses `resampled` (resamples, points) in the order of the frame, and so many resampled laws."""
        fitted = np.log(curve.loss_of(curve.frame))
        self._residual = np.log(curve.frame["loss"].to_numpy(dtype=np.float64)) - fitted
        self._deviation = resampled - fitted
        self._spread = np.sqrt(np.mean(self._deviation**2, axis=0))
        self._curve, self._log_x = curve, np.log(curve.law.x(curve.frame))
        self._axis = next(j for j, one in enumerate(curve.law.inputs) if one.axis == "data")
        self._log_flops, self._draws = np.log(curve.flops), draws

    def of(self, rung: Rung) -> tuple[Array, Array]:
        """Return log losses (rows) of a rung's points, had they been trained for its FLOPs: seen, and of the laws.

        The latter are those of the estimate and the resamples (problems, rows).
        """
        z = self._log_x[rung.rows]
        z[:, self._axis] += rung.log_flops - self._log_flops[rung.rows]
        by_law = np.log(self._curve.law.predict(self._curve.params[: self._draws + 1], z))
        return by_law[0] + self._residual[rung.rows], by_law

    def drawn(self, rung: Rung, noise: float | None) -> Array:
        """Return deviations of a rung's points in each resample (resamples, rows).

        With a `noise` each point has that standard deviation, and keeps its sign in the resample: points of one series
        go on deviating together. Without one each keeps its own residual from the law.
        """
        own = self._deviation[:, rung.rows]
        return own if noise is None else own * (noise / np.maximum(self._spread[rung.rows], TINY))
