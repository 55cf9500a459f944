"""The effect of size on the loss. It counts clusters and not rows, since the errors of one series are correlated."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from analysis.fitting.bootstrap import Fitted
from analysis.fitting.solver import limits, minimise
from analysis.laws.law import Array

SIGNIFICANT = 0.05
FEWEST_FREEDOM = 2


def freedom(fit: Fitted) -> int:
    """Return points less parameters (of all architectures, where they share one); 0 leaves no error to measure."""
    problem = fit.problem if fit.joint is None else fit.joint.problem
    return len(problem.y) - len(problem.law.names)


def size_effect(fit: Fitted, seed_sd: float | None = None) -> float | None:
    """Return the p-value of the effect of size on the loss.

    None for a law without size, and for one with as many parameters as points, which passes through all of them.

    An F test of the law against itself with A = 0, on the mean of each cluster's `ordinary_residual`s; its two further
    parameters are A and alpha, and the upper tail of F with 2 and nu degrees of freedom is (1 + 2 F / nu)^(-nu/2). With
    too few clusters the noise is that of the rows, or that between seeds (`seed_sd`, relative to the loss) if larger.
    """
    problem, law = fit.problem, fit.problem.law
    if not law.sizeless or freedom(fit) <= 0:
        return None
    without = replace(problem, held={**problem.held, **law.sizeless})
    starts = fit.result.rivals.copy()
    starts[:, 0] += starts[:, law.names.index(next(iter(law.sizeless)))]
    found = minimise(without, *problem.copies(len(starts)), starts, *limits(without))
    nothing = found.u[int(np.argmin(found.objective))]
    used = problem.weight > 0
    _, cluster = np.unique(fit.cluster[used], return_inverse=True)
    rows = np.bincount(cluster).astype(float)
    ordinary = (problem.y - fit.residual)[used] + fit.ordinary_residual

    def spread(u: Array) -> tuple[float, Array]:
        residual = ordinary - np.log(law.predict(u[None], problem.z[used])[0])
        means = np.bincount(cluster, residual) / rows
        return float((rows * means**2).sum()), residual

    flat, _ = spread(nothing)
    fitted, residual = spread(fit.result.u)
    if flat <= fitted:
        return 1.0
    left = len(rows) - 3
    if left >= FEWEST_FREEDOM:
        return float((fitted / flat) ** (left / 2))
    left = max(1, len(residual) - len(law.names))
    noise = max(float(residual @ residual) / left, (seed_sd or 0.0) ** 2)
    ratio = (flat - fitted) / 2 / max(noise * float(rows.mean()), 1e-300)
    return float((1 + 2 * ratio / left) ** (-left / 2))
