"""The robust scale by which residuals become statistics, and the Huber delta that follows from it.

A run that diverged has a residual hundreds of times the others'. The scale is therefore a median, delta is 1.345 scales
(95 % efficient under normal noise: Huber 1981, Robust Statistics), and a residual enters a statistic as at most
`CLIPPED` scales.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from analysis.laws.law import Array

NORMAL = 1.4826
"""Standard deviations in a median absolute value of normal noise."""
EFFICIENT = 1.345
"""Delta in robust standard deviations."""
LEAST_DELTA = 1e-7
CLIPPED = 3.0
DIVERGED_DEVIATIONS, DIVERGED_RESIDUAL = 10.0, 0.1
DIVERGED_RULE = (
    f"more than {DIVERGED_DEVIATIONS:g} robust standard deviations and more than {100 * DIVERGED_RESIDUAL:g} % above "
    "the law of its architecture"
)


def robust_scale(residual: Array, parameters: int = 0) -> float:
    """Return the standard deviation of normal noise with the median of these absolute residuals (points).

    As many of the smallest residuals as the law has parameters do not count: the fit passes through so many points.
    """
    free = max(1, len(residual) - parameters)
    return NORMAL * float(np.median(np.sort(np.abs(residual))[-free:]))


def delta_of(residuals: Sequence[Array], parameters: int) -> float:
    """Return Huber's delta for the residuals of all architectures about pilot fits with so many parameters each."""
    return max(LEAST_DELTA, EFFICIENT * robust_scale(np.concatenate(residuals), parameters * len(residuals)))


def clipped(residual: Array, scale: float) -> Array:
    """Return residuals (points) of at most `CLIPPED` scales; a scale of 0 clips none."""
    return np.clip(residual, -CLIPPED * scale, CLIPPED * scale) if scale > 0 else residual


def diverged(residual: Array, parameters: int) -> NDArray[np.bool_]:
    """Return a mask of points so far above their law that training has diverged (`DIVERGED_RULE`)."""
    most = max(DIVERGED_DEVIATIONS * robust_scale(residual, parameters), float(np.log1p(DIVERGED_RESIDUAL)))
    return residual > most
