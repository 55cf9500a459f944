"""Checks of a fit: an effect of size on the loss, patterns in the residuals, and errors on held-out points.

The first two count clusters and not rows, since the errors of one series are correlated. In-sample error says little
about extrapolation (0.25 % against -3.8 % on the OLMo ladder), so reports never show it alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from analysis.fitting.bootstrap import Fitted
from analysis.fitting.shared_e import fit_shared
from analysis.fitting.solver import Problem, Status, fit_law, limits, minimise
from analysis.laws.law import Array, Law

SIGNIFICANT = 0.05
STRUCTURED = 0.01
FLIPS = 999
FLIPPED = 8_000_000  # residuals flipped at once
FEWEST_FREEDOM = 2
# Above so many distinct values the top fifth of the rows is left out instead of the top value.
MAX_VALUES = 10
TOP_SHARE = 0.8


@dataclass(frozen=True)
class Pattern:
    """A pattern in residuals: its strongest term, its size relative to the loss, and its probability by chance."""

    term: str
    size: float
    p: float


@dataclass(frozen=True)
class Split:
    """Rows left out at and above `threshold`, the fit of the rest, and its predictions for them."""

    threshold: float
    left_out: NDArray[np.bool_]
    predicted: Array  # nats, one for each row left out
    relative_error: Array  # (predicted - observed) / observed
    status: Status
    determined: bool  # True if the rest has at least three sizes and three budgets


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
    by_size = [name for name, (column, _) in law.scaled.items() if law.size and column == law.size.column]
    if not by_size or freedom(fit) <= 0:
        return None
    without = replace(problem, held={**problem.held, by_size[0]: 0.0})
    starts = fit.result.rivals.copy()
    starts[:, 0] += starts[:, law.names.index(by_size[0])]
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


def pattern(fit: Fitted, seed: int) -> Pattern | None:
    """Return curvature or interaction left in the residuals; None if flipping clusters' signs explains as much."""
    problem, law = fit.problem, fit.problem.law
    loss, jacobian = law.predict_with_jacobian(fit.result.u[None], problem.z)
    residual = problem.y - np.log(loss[0])
    # Outliers are clipped: the fit is robust to them as well.
    far = 3 * 1.4826 * float(np.median(np.abs(residual - np.median(residual))))
    residual = np.clip(residual, -far, far) if far > 0 else residual
    slope = jacobian[0] / loss[0][:, None]
    lacking = {f"curvature in {law.inputs[j].axis}": problem.z[:, j] ** 2 for j in law.axes}
    if law.size and law.data:
        lacking["size and data acting together"] = np.prod(problem.z[:, law.axes], axis=1)
    columns = {}
    for name, values in lacking.items():
        left = values - slope @ np.linalg.lstsq(slope, values, rcond=None)[0]
        if float(np.linalg.norm(left)) > 1e-3 * float(np.linalg.norm(values - values.mean())):
            columns[name] = left
    if not columns or not np.any(residual):
        return None
    basis, _ = np.linalg.qr(np.stack(list(columns.values()), axis=1))
    rng, size = np.random.default_rng([seed, 4]), max(1, FLIPPED // len(residual))
    flips = (
        rng.choice([-1.0, 1.0], (min(size, FLIPS - done), len(fit.keys))) for done in range(0, FLIPS, size)
    )
    chance = np.concatenate(
        [(((signs[:, fit.cluster] * residual) @ basis) ** 2).sum(axis=1) for signs in flips]
    )
    seen = float(((residual @ basis) ** 2).sum())
    p = float((1 + (chance >= seen * (1 - 1e-12)).sum()) / (1 + FLIPS))
    if p > STRUCTURED:
        return None
    strongest = max(columns, key=lambda name: abs(residual @ columns[name]) / np.linalg.norm(columns[name]))
    return Pattern(strongest, float(np.sqrt(seen / len(residual))), p)


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
    out = x[:, column] >= threshold
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
        determined=all(len(np.unique(x[rest][:, j])) >= 3 for j in law.axes),
    )
