"""A parabola in ln N through the losses of one budget, its minimum, and the noise of the losses about it.

Once its sizes are chosen, the minimum is a ratio of two sums that are linear in the log losses, so that resamples cost
one product. The noise of a rung of 4 to 10 sizes is known badly from its own residuals: intervals from those alone
held the truth in 87 to 93 % of simulations. So a rung's variance is drawn towards that of all rungs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from analysis.findings.rungs import FEWEST, Rung
from analysis.laws.law import Array

WINDOW = float(np.log(5.0))
"""Distance in ln N of the sizes of a parabola from its minimum."""
CLOSED = 0.95  # least share of the resamples whose parabola has a minimum, for an interval
MOVES = 5  # of a window at most
STUDENT = 0.25 * (1.96**2 + 1)
PRIOR = 6.0  # degrees of freedom with which the variance of all rungs enters that of one


@dataclass(frozen=True)
class Parabola:
    """A parabola by least squares through the sizes of a rung in `window`."""

    rung: Rung
    window: slice

    @classmethod
    def about_the_minimum(cls, rung: Rung, values: Array) -> Parabola:
        """Take the sizes within a factor 5 of the minimum of values (rows), or the nearest 4 if those are fewer.

        The window begins at the lowest loss, and moves to the minimum of the parabola until that stays.
        """
        at = rung.log_sizes
        centre = float(at[np.argmin(rung.at_sizes(values))])
        one = cls(rung, slice(0, 0))
        for _ in range(MOVES):
            low, high = np.searchsorted(at, [centre - WINDOW, centre + WINDOW])
            if high - low < FEWEST:
                nearest = np.argsort(np.abs(at - centre), kind="stable")[:FEWEST]
                low, high = nearest.min(), nearest.max() + 1
            before, one = one, cls(rung, slice(int(low), int(high)))
            vertex = one.vertex(values[None])[0]
            if one == before or not np.isfinite(vertex):
                break
            centre = float(np.clip(vertex, at[0], at[-1]))
        return one

    @property
    def sampled(self) -> Array:
        """Log sizes in the window, ascending."""
        return self.rung.log_sizes[self.window]

    @cached_property
    def _inverse(self) -> Array:
        """Coefficients of 1, x and x^2 about the mean log size, by the losses of the sizes (3, sizes)."""
        design = np.vander(self.sampled - self.sampled.mean(), 3, increasing=True)
        return np.linalg.pinv(design)

    def vertex(self, values: Array) -> Array:
        """Return ln N at the minimum (problems) by log losses of the rung's rows (problems, rows); nan without one."""
        return self.minimum(values)[0]

    def minimum(self, values: Array) -> tuple[Array, Array]:
        """Return ln N and the log loss at the minimum (problems), as `vertex` does."""
        place = self.rung.place - self.window.start
        used = (place >= 0) & (place < len(self.sampled))
        level, slope, bend = (self._inverse[:, place[used]] * self.rung.share[used]) @ values[:, used].T
        with np.errstate(divide="ignore", invalid="ignore"):
            shift = np.where(bend > 0, -slope / (2 * bend), np.nan)
        return self.sampled.mean() + shift, level + 0.5 * slope * shift

    def misfit(self, values: Array) -> tuple[float, float]:
        """Return the sum of squares that the parabola leaves of values (rows), and its degrees of freedom.

        Their quotient is the variance of one point: a size of m points has a mth of it.
        """
        design = np.vander(self.sampled - self.sampled.mean(), 3, increasing=True)
        left = np.eye(len(design)) - design @ self._inverse
        own = self.rung.at_sizes(values)[self.window]
        share = self.rung.at_sizes(self.rung.share)[self.window]
        return float(np.sum((left @ own) ** 2)), float(np.sum(np.diag(left) * share))


def noise_of(misfits: Sequence[tuple[float, float]]) -> Array | None:
    """Return the standard deviation of a point's log loss in each rung (rungs), from their `Parabola.misfit`.

    It is widened by the ratio of Student's 97.5 % quantile to the normal one, 1 + (z^2 + 1) / 4 nu to first order
    (Abramowitz and Stegun 26.7.5). None if the sizes are too few to leave residuals.
    """
    squares, freedom = np.array(misfits).T
    if freedom.sum() < 2:
        return None
    typical = squares.sum() / freedom.sum()
    known = freedom + PRIOR
    out: Array = np.sqrt((squares + PRIOR * typical) / known) * (1 + STUDENT / known)
    return out
