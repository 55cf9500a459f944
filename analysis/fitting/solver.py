"""The solver: minimises the SUM of Huber(delta) on log-loss residuals for many resamples at once.

A coarse grid over the nonlinear parameters, with the linear ones projected out in closed form (variable projection),
gives starts that depend on no guess. Levenberg-Marquardt with analytic Jacobians polishes all of them together. A step
first follows the second derivative of the Huber loss, which is exact near the optimum. If it gains less than it
promised, the solver also tries re-weighted least squares, which is robust far away, and takes the better step: with
delta far below the noise the objective is nearly a sum of absolute values, on which either method alone is slow. A mean
instead of the sum would stop early, as it did in the Chinchilla paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from analysis.laws.law import Array, Law

Status = Literal["converged", "max_iter", "bound_hit", "abnormal"]
Mask = NDArray[np.bool_]
Rows = NDArray[np.int64]

GRID = 24  # cells an axis of the projection grid
STARTS = 12  # grid cells polished for the point estimate
MAX_ITER = 400
FLOOR = 1e-12
SLICE = 80_000  # points times problems processed at once: they fit into a processor's cache
AT_ONCE = 2048  # points whose grid cells are computed at once
MANY = 10_000  # points from which on the starts are minima of a fit to fewer points
KEPT = 0.5  # a step that gains this share of its promise is taken without trying the other method


@dataclass(frozen=True)
class Problem:
    """One architecture's data in the solver's terms: centred inputs z (points, inputs), log loss y (points)."""

    law: Law
    z: Array
    y: Array
    centre: Array
    delta: float
    held: Mapping[str, float] = field(default_factory=dict)  # parameters held fixed, in the solver's terms
    left_out: Mask | None = None  # points (points) without weight in every fit, such as those that diverged

    @classmethod
    def of(
        cls, law: Law, x: Array, loss: Array, delta: float, held: Mapping[str, float] | None = None
    ) -> Problem:
        """Make a problem of inputs x (points, inputs) in their own units and losses (points) in nats.

        `held` fixes parameters at values in the law's own units. Centring joins a coefficient with its exponent, so a
        coefficient without its exponent raises ValueError.
        """
        centre = law.centre(x)
        held = dict(held or {})
        for name in held:
            if name in law.scaled and law.scaled[name][1] not in held:
                raise ValueError(f"{name} can be held only together with {law.scaled[name][1]}")
        public = np.array([[held.get(name, 1.0) for name in law.names]])
        solver = law.to_solver(public, centre)[0]
        fixed = {name: float(solver[law.names.index(name)]) for name in held}
        return cls(law, law.centred(x, centre), np.log(loss), centre, delta, fixed)

    def thinned(self, most: int) -> Problem:
        """Return this problem with at most so many of its points, evenly spaced."""
        if len(self.y) <= most:
            return self
        kept = np.linspace(0, len(self.y) - 1, most).astype(np.int64)
        left_out = None if self.left_out is None else self.left_out[kept]
        return replace(self, z=self.z[kept], y=self.y[kept], left_out=left_out)

    @property
    def weight(self) -> Array:
        """Weights (points): 1, or 0 for a point that is left out."""
        out: Array = np.ones(len(self.y)) if self.left_out is None else (~self.left_out).astype(np.float64)
        return out

    def copies(self, count: int) -> tuple[Array, Array]:
        """Return log losses and weights (count, points): this problem so many times in a batch."""
        return np.tile(self.y, (count, 1)), np.tile(self.weight, (count, 1))


@dataclass(frozen=True)
class Solution:
    """Result of a batch of minimisations: u (problems, parameters), objective, and a mask of the settled ones."""

    u: Array
    objective: Array
    settled: Mask


@dataclass(frozen=True)
class FitResult:
    """A fitted law: parameters in its own units by name, the objective, the status and the parameters on a bound."""

    u: Array
    params: dict[str, float]
    objective: float
    status: Status
    at_bound: tuple[str, ...]
    rivals: Array  # distinct local minima (rivals, parameters), the lowest first: starts of other fits


def fit_law(problem: Problem) -> FitResult:
    """Fit one law to one set of points; of very many points some are fitted first, from whose minima the fit starts."""
    few = problem.thinned(MANY)
    starts = projected_starts(few, *few.copies(1), cells=GRID, keep=STARTS)[0]
    found = minimise(few, *few.copies(len(starts)), starts, *limits(problem))
    if few is not problem:
        order = np.argsort(found.objective, kind="stable")
        starts = distinct(found.u[order], found.objective[order])
        found = minimise(problem, *problem.copies(len(starts)), starts, *limits(problem))
    return polished(problem, found)


def fit_from(problem: Problem, starts: Array) -> FitResult:
    """Fit one law to one set of points from starts (starts, parameters), such as the minima of a similar fit."""
    return polished(problem, minimise(problem, *problem.copies(len(starts)), starts, *limits(problem)))


def polished(problem: Problem, found: Solution) -> FitResult:
    """Return the lowest of several solutions of one problem, minimised further."""
    law = problem.law
    order = np.argsort(found.objective, kind="stable")
    best = found.u[order[:1]]
    final = minimise(problem, *problem.copies(1), best, *limits(problem), tolerance=1e-15)
    at_bound = tuple(name for name, hit in zip(law.names, on_bound(problem, final.u)[0], strict=True) if hit)
    public = law.to_public(final.u, problem.centre)[0]
    status: Status = "converged" if final.settled[0] else "max_iter"
    finite = np.isfinite(final.objective[0]) and np.isfinite(final.u[0]).all()
    if not finite or problem.weight.sum() < len(law.names) - len(problem.held):
        status = "abnormal"
    elif at_bound:
        status = "bound_hit"
    return FitResult(
        params=dict(zip(law.names, public.tolist(), strict=True)),
        u=final.u[0],
        objective=float(final.objective[0]),
        status=status,
        at_bound=at_bound,
        rivals=distinct(found.u[order], found.objective[order]),
    )


def limits(problem: Problem) -> tuple[Array, Array]:
    """Return lower and upper bounds of the solver's parameters; both are equal for a held parameter."""
    law = problem.law
    ceiling = 1e3 * float(np.exp(problem.y.max()))
    low = [0.0] * len(law.linear) + [bound[0] for bound in law.bounds]
    high = [ceiling] * len(law.linear) + [bound[1] for bound in law.bounds]
    for name, value in problem.held.items():
        low[law.names.index(name)] = high[law.names.index(name)] = value
    return np.array(low), np.array(high)


def on_bound(problem: Problem, u: Array) -> Mask:
    """Return a mask of the parameters of u (problems, parameters) that lie on a bound and are not held."""
    low, high = limits(problem)
    held = np.array([name in problem.held for name in problem.law.names])
    out: Mask = ((u <= low * (1 + 1e-9) + FLOOR) | (u >= high * (1 - 1e-9))) & ~held
    return out


def huber(r: Array, delta: float) -> Array:
    """Return Huber's loss: r^2/2 within delta, delta (|r| - delta/2) beyond."""
    size = np.abs(r)
    return np.where(size <= delta, 0.5 * r * r, delta * (size - 0.5 * delta))


def objective_at(problem: Problem, u: Array, y: Array, w: Array) -> Array:
    """Return the sum of weighted Huber losses (problems) at u (problems, parameters)."""
    loss = np.maximum(problem.law.predict(u, problem.z), FLOOR)
    total: Array = (w * huber(np.log(loss) - y, problem.delta)).sum(axis=1)
    return np.where(np.isfinite(total), total, np.inf)


def minimise(
    problem: Problem,
    y: Array,
    w: Array,
    u: Array,
    low: Array,
    high: Array,
    *,
    max_iter: int = MAX_ITER,
    tolerance: float = 1e-11,
) -> Solution:
    """Minimise a batch inside a box by Levenberg-Marquardt: y, w (problems, points), u (problems, parameters).

    low and high are (parameters) or (problems, parameters); equal ones hold a parameter fixed. A problem has settled
    when one step that kept its promise, or several steps in a row, improve the objective by less than the share
    `tolerance`, or when no damping finds an improving step.
    """
    low, high = np.broadcast_to(low, u.shape), np.broadcast_to(high, u.shape)
    u = np.clip(u, low, high)
    value = objective_at(problem, u, y, w)
    damping = np.full(len(u), 1e-3)
    calm = np.zeros(len(u), dtype=np.int64)
    settled = np.zeros(len(u), dtype=bool)
    for _ in range(max_iter):
        live = np.flatnonzero(~settled)
        if live.size == 0:
            break
        size = max(1, SLICE // y.shape[1])
        slices = [live[start : start + size] for start in range(0, len(live), size)]
        steps = [
            _best_step(problem, y[rows], w[rows], u[rows], value[rows], low[rows], high[rows], damping[rows])
            for rows in slices
        ]
        tried, reached, kept = (np.concatenate(parts) for parts in zip(*steps, strict=True))
        gain = value[live] - reached
        better = gain > 0
        small = ~better | (gain <= tolerance * np.maximum(value[live], 1e-300))
        u[live[better]] = tried[better]
        value[live[better]] = reached[better]
        damping[live] = np.clip(np.where(better, damping[live] * 0.2, damping[live] * 6.0), 1e-12, 1e12)
        calm[live] = np.where(small, calm[live] + 1, 0)
        stuck = ~better & (damping[live] > 1e9)
        settled[live] = stuck | (better & small & (kept | (calm[live] >= 4))) | (value[live] == 0.0)
    return Solution(u, value, settled)


def lowest(problem: Problem, y: Array, w: Array, starts: Sequence[Array], tolerance: float) -> Array:
    """Return the lowest u (problems, parameters) of short descents from each of `starts` (problems, parameters)."""
    low, high = limits(problem)
    best, value = starts[0], np.full(len(y), np.inf)
    for start in starts:
        found = minimise(problem, y, w, start, low, high, max_iter=60, tolerance=tolerance)
        better = found.objective < value
        best = np.where(better[:, None], found.u, best)
        value = np.where(better, found.objective, value)
    return best


def projected_starts(problem: Problem, y: Array, w: Array, *, cells: int, keep: int) -> Array:
    """Return the best grid cells (problems, keep, parameters), the linear parameters solved for in each.

    The projection is weighted least squares on relative residuals, the first order of log residuals. Its normal
    equations are linear in the weights, so that all resamples share one matrix product.
    """
    law = problem.law
    k = len(law.linear)
    theta, shape = _grid(law, cells)
    gram, rhs = np.zeros((len(y), len(theta), k, k)), np.zeros((len(y), len(theta), k))
    for start in range(0, len(problem.z), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        phi = law.terms(theta, problem.z[part])
        loss, weights = np.exp(y[:, part]), w[:, part]
        outer = (phi[:, :, :, None] * phi[:, :, None, :]).reshape(*phi.shape[:2], k * k)
        gram += np.einsum("rn,gnq->rgq", weights / loss**2, outer, optimize=True).reshape(gram.shape)
        rhs += np.einsum("rn,gnk->rgk", weights / loss, phi, optimize=True)
    coefficients, cost = _positive(gram, rhs)
    chosen = _spread(cost, shape, min(keep, len(theta)))
    rows = np.arange(len(y))[:, None]
    return np.concatenate([coefficients[rows, chosen], theta[chosen]], axis=2)


def _best_step(
    problem: Problem, y: Array, w: Array, u: Array, value: Array, low: Array, high: Array, damping: Array
) -> tuple[Array, Array, Mask]:
    """Return each problem's next u, its objective, and a mask of the steps that gained what they had promised."""
    loss, jacobian = problem.law.predict_with_jacobian(u, problem.z)
    loss = np.maximum(loss, FLOOR)
    jacobian /= loss[:, :, None]
    r = np.log(loss) - y
    size = np.abs(r)
    slope = ((w * np.clip(r, -problem.delta, problem.delta))[:, None, :] @ jacobian)[:, 0]
    span = high - low
    edge = 1e-12 * np.maximum(1.0, np.abs(u))
    held = ((u <= low + edge) & (slope > 0)) | ((u >= high - edge) & (slope < 0)) | (span <= 0)
    slope = np.where(held, 0.0, slope)

    def follow(curvature: Array, rows: Rows | slice, least: float) -> tuple[Array, Array, Array]:
        """Return the next u of `rows` by a curvature (problems, points), its objective, and the promised gain."""
        part, change = jacobian[rows], slope[rows]
        matrix = (part * curvature[:, :, None]).transpose(0, 2, 1) @ part
        free = ~held[rows]
        system = matrix * (free[:, :, None] & free[:, None, :])
        scale = np.maximum(np.einsum("rpp->rp", matrix), 1e-18) * np.maximum(damping[rows], least)[:, None]
        change = _solve(system, np.where(free, scale, 1.0), change)
        bent = (system @ change[:, :, None])[:, :, 0]
        promise = (change * (slope[rows] - 0.5 * bent)).sum(axis=1)
        there = np.clip(u[rows] - change, low[rows], high[rows])
        return there, objective_at(problem, there, y[rows], w[rows]), promise

    tried, reached, promise = follow(w * (size <= problem.delta), slice(None), 1e-9)
    kept = (reached < value) & (value - reached >= KEPT * promise)
    rest = np.flatnonzero(~kept)
    if rest.size:
        bend = np.minimum(1.0, problem.delta / np.maximum(size[rest], FLOOR))
        other, there, _ = follow(w[rest] * bend, rest, 0.0)
        better = there < reached[rest]
        tried[rest[better]], reached[rest[better]] = other[better], there[better]
    return tried, reached, kept


def _solve(matrix: Array, lift: Array, rhs: Array) -> Array:
    index = np.arange(matrix.shape[1])
    system = matrix.copy()
    system[:, index, index] += lift
    # With a unit diagonal, a system is singular only if its damping is negligible against its neighbours'.
    root = np.sqrt(np.maximum(system[:, index, index], 1e-300))
    system /= root[:, :, None] * root[:, None, :]
    system[:, index, index] += 1e-13
    step: Array = np.linalg.solve(system, (rhs / root)[:, :, None])[:, :, 0] / root
    return np.where(np.isfinite(step), step, 0.0)


def _grid(law: Law, cells: int) -> tuple[Array, tuple[int, ...]]:
    """Return the cells of a grid (cells, nonlinear) and its shape: `cells` along each of up to two axes.

    With more axes the grid has about as many cells in all as with two.
    """
    axes = len(law.nonlinear)
    count = cells if axes <= 2 else max(3, round(cells ** (2 / axes)))
    values = [np.geomspace(low * 1.5, high * 0.8, count) for low, high in law.bounds]
    mesh = np.meshgrid(*values, indexing="ij")
    return np.stack([axis.ravel() for axis in mesh], axis=1), (count,) * axes


def _positive(gram: Array, rhs: Array) -> tuple[Array, Array]:
    """Solve least squares with coefficients >= 0: try all coefficients, then all but one."""
    k = rhs.shape[-1]
    best = np.zeros_like(rhs)
    cost = np.full(rhs.shape[:-1], np.inf)
    supports = [tuple(range(k)), *(tuple(j for j in range(k) if j != out) for out in range(k))]
    for support in supports:
        pick = np.array(support)
        matrix = gram[..., pick[:, None], pick]
        root = np.sqrt(np.maximum(matrix[..., range(len(pick)), range(len(pick))], 1e-300))
        matrix = matrix / (root[..., :, None] * root[..., None, :])
        matrix[..., range(len(pick)), range(len(pick))] += 1e-11
        values = np.linalg.solve(matrix, (rhs[..., pick] / root)[..., None])[..., 0] / root
        values = np.maximum(values, 0.0) if support != supports[0] else values
        part = rhs[..., pick]
        fit = np.einsum("...i,...ij,...j->...", values, gram[..., pick[:, None], pick], values)
        loss = fit - 2.0 * (part * values).sum(axis=-1)
        take = (values >= 0).all(axis=-1) & (loss < cost)
        cost = np.where(take, loss, cost)
        full = np.zeros_like(rhs)
        full[..., pick] = values
        best = np.where(take[..., None], full, best)
    return best, cost


def _spread(cost: Array, shape: tuple[int, ...], keep: int) -> NDArray[np.int64]:
    """Return indices (problems, keep) of the cheapest cells, the grid's local minima first: no valley is missed."""
    from scipy.ndimage import minimum_filter1d

    field = cost.reshape(len(cost), *shape)
    lowest = np.ones(field.shape, dtype=bool)
    for axis in range(1, field.ndim):
        lowest &= field == minimum_filter1d(field, 3, axis=axis)
    flat = cost - np.where(lowest.reshape(cost.shape), 1e6 * (1.0 + np.abs(cost).max()), 0.0)
    order: NDArray[np.int64] = np.argsort(flat, axis=1, kind="stable")[:, :keep]
    return order


def distinct(u: Array, objective: Array) -> Array:
    """Return the three lowest different minima (minima, parameters) of u, which is in ascending order of objective."""
    kept = [u[0]]
    for candidate, value in zip(u[1:], objective[1:], strict=True):
        if value > 2.0 * objective[0] + FLOOR or len(kept) >= 3:
            break
        if all(np.abs(candidate - other).max() > 1e-3 for other in kept):
            kept.append(candidate)
    return np.array(kept)
