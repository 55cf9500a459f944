"""The least loss of each budget as the losses show it: the minima of parabolas at equal compute.

The fitted law's frontier carries them between budgets, as it carries losses to a budget: a law that misses the losses
smoothly costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from analysis.findings.curve import Curve
from analysis.findings.equal_compute import EqualCompute
from analysis.findings.law_optimum import law_optimum
from analysis.findings.parabola import CLOSED, WINDOW
from analysis.laws.law import Array

SAME = float(np.log(1.05))
"""Distance in ln C, and in ln N, that counts as inside."""
BESIDE = 0.5  # distance in ln C outside the budgets seen up to which resamples are followed
FINE = 200  # budgets of the table in which resamples are looked up


@dataclass(frozen=True)
class LeastLosses:
    """Least log losses by budget: those of the law's frontier, and what the minima of the parabolas add to them.

    The parabola of the law's own losses at the same sizes is subtracted, so that its bias cancels. Between budgets what
    is added is linear in ln C. `added` is (1 + resamples, budgets), the losses as seen first.
    """

    curve: Curve
    log_flops: Array
    added: Array

    @classmethod
    def of(cls, found: EqualCompute) -> LeastLosses | None:
        """Take the budgets whose sizes hold the minimum; None if they are fewer than 2."""
        levels, added = [], []
        for one in found.budgets:
            sampled = one.parabola.sampled
            at, least = one.parabola.minimum(np.vstack([one.values, one.values + one.deviation]))
            _, by_law = one.parabola.minimum(one.by_law[:1])
            closed = (sampled[0] - WINDOW < at) & (at < sampled[-1] + WINDOW)
            if sampled[0] < at[0] < sampled[-1] and np.isfinite(by_law[0]) and closed.mean() >= CLOSED:
                levels.append(one.parabola.rung.log_flops)
                added.append(np.where(closed, least - by_law[0], np.nan))
        return cls(found.curve, np.array(levels), np.array(added).T) if len(levels) >= 2 else None

    def covers(self, log_flops: float) -> bool:
        """Return True between the least and the largest budget."""
        return bool(self.log_flops[0] - SAME <= log_flops <= self.log_flops[-1] + SAME)

    def least(self, log_flops: Array) -> Array:
        """Return the least log loss (1 + resamples, budgets); beyond the budgets seen, with what the last one adds."""
        by_law = np.log(law_optimum(self.curve, self.curve.params[:1], log_flops).loss[0])
        share = np.array([np.interp(log_flops, self.log_flops, unit) for unit in np.eye(len(self.log_flops))])
        out: Array = by_law + self.added @ share
        return out

    def budgets_of(self, log_loss: Array) -> Array:
        """Return log FLOPs (1 + resamples) with the least log loss `log_loss` (1 + resamples); nan if none near has."""
        count = min(len(log_loss), len(self.added))
        table = np.linspace(self.log_flops[0] - BESIDE, self.log_flops[-1] + BESIDE, FINE)
        falling = np.minimum.accumulate(self.least(table)[:count], axis=1)
        right = (falling > log_loss[:count, None]).sum(axis=1)
        inside = (right > 0) & (right < FINE) & np.isfinite(falling[:, 0] + log_loss[:count])
        right, rows = np.clip(right, 1, FINE - 1), np.arange(count)
        before, after = falling[rows, right - 1], falling[rows, right]
        with np.errstate(divide="ignore", invalid="ignore"):
            share = (before - log_loss[:count]) / (before - after)
        return np.where(inside, table[right - 1] + share * (table[1] - table[0]), np.nan)
