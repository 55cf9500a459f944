"""Intervals of a fit: each of many resamples of the campaign is fitted again.

Rows of one training run share its seed and its trunk, so no row is resampled alone (on the Gemstones points that
triples the standard deviation of alpha). Many series are drawn with replacement. Of few, draws would have too short
tails and too few sizes, so normal noise of the size that a mixed model finds is added to the law (`noise`). Where the
rows of a series are alike beyond a common shift, as points taken mid-run are, that model does not hold: the residuals
of each series are then multiplied by a random factor, a wild cluster bootstrap (Cameron, Gelbach and Miller 2008,
doi 10.1162/rest.90.3.414; Webb 2023, doi 10.1111/caje.12661).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from analysis.fitting.noise import Block, Key, Noise, noise_of
from analysis.fitting.scale import clipped, robust_scale
from analysis.fitting.shared_e import Joint, refit_shared
from analysis.fitting.solver import (
    SLICE,
    FitResult,
    Problem,
    lowest,
    objective_at,
    on_bound,
    projected_starts,
)
from analysis.laws.law import Array

Scheme = Literal["cluster", "mixed", "wild"]

FEW_CLUSTERS = 8
MANY_CLUSTERS = 100
"""Series from which on they are drawn: of 20 and of 45, 9 % of the intervals missed the truth in simulations."""
FEWEST_SIZES = 3
CORRELATED, SHUFFLES, SHUFFLED = 0.01, 499, 4_000_000
"""Probability by chance below which neighbouring rows are alike; shuffles; most residuals shuffled."""
# Webb's six-point distribution has mean 0 and variance 1, and gives 6^clusters distinct resamples; signs alone give
# 2^clusters.
WEBB = np.array([-1.5, -1.0, -0.5, 0.5, 1.0, 1.5])
WEBB = np.sign(WEBB) * np.sqrt(np.abs(WEBB))
# Least share of a residual that the fit is assumed to leave over: the correction divides by it.
LEVERAGE_FLOOR = 0.1
RESAMPLE_CELLS = 8
# Share of the resamples that are also started elsewhere. If one resample in fifty has a lower minimum elsewhere, 128 of
# a thousand show it in 12 cases of 13.
STARTED_ELSEWHERE = 0.128
LOWER = 1e-5  # relative difference from which on a lower objective is another minimum
FEWEST_AT_ONCE = 20  # resamples processed at once, of any number of points
WORK = 20_000_000  # points times resamples that an ordinary machine refits in about ten seconds
RESAMPLES, FEWEST_RESAMPLES = 1000, 100
LARGE_CLUSTER = 256  # rows from which on the leverage of a cluster is taken from its few directions

Drawn = Callable[[NDArray[np.int64]], tuple[Array, Array]]
"""Returns the log losses and the weights (rows, points) of those resamples: all of them would fill the memory."""


@dataclass(frozen=True)
class Fitted:
    """One architecture fitted: its problem, its result, and the cluster of each row."""

    architecture: str
    problem: Problem
    result: FitResult
    cluster: NDArray[np.int64]  # (points), index into keys
    keys: tuple[Key, ...]
    size: Array  # (points) n_params
    joint: Joint | None = None  # the fit of all architectures, where they share a parameter
    part: int = 0  # number of this one in it

    @property
    def residual(self) -> Array:
        """Log loss of the points less that of the law (points)."""
        out: Array = self.problem.y - np.log(self.problem.law.predict(self.result.u[None], self.problem.z)[0])
        return out

    @property
    def slope(self) -> Array:
        """Derivatives of the law's log loss at the points by its parameters (points, parameters)."""
        loss, jacobian = self.problem.law.predict_with_jacobian(self.result.u[None], self.problem.z)
        out: Array = jacobian[0] / loss[0][:, None]
        return out

    @property
    def ordinary_residual(self) -> Array:
        """Residuals (points) of the points that did not diverge, each of at most three robust standard deviations."""
        residual = self.residual[self.problem.weight > 0]
        return clipped(residual, robust_scale(residual, len(self.problem.law.names)))


@dataclass(frozen=True)
class Resamples:
    """Parameters of every refit (resamples, parameters) by architecture; row r is the same draw for all of them."""

    params: Mapping[str, Array]
    at_bound: Mapping[str, float]  # share of resamples with a parameter on a bound
    paired: bool
    scheme: Scheme
    seed: int
    drawn: Mapping[str, Drawn]  # by architecture: the resamples that were fitted

    def with_estimate(self, fit: Fitted) -> Array:
        """Return the parameters of the fit, then those of every resample: (1 + resamples, parameters)."""
        return np.vstack([[list(fit.result.params.values())], self.params[fit.architecture]])


def cluster_keys(
    size: Array, seed: Array, cluster: Sequence[str]
) -> tuple[NDArray[np.int64], tuple[Key, ...]]:
    """Return the index of each row's cluster, and the key of each cluster; a missing seed counts as -1."""
    first: dict[str, tuple[int, int]] = {}
    for rung, number, name in zip(np.unique_inverse(size).inverse_indices, seed, cluster, strict=True):
        first.setdefault(name, (int(rung), -1 if np.isnan(number) else int(number)))
    names = sorted(first, key=lambda name: (first[name], name))
    alike = groupby(first[name] for name in names)
    keys = tuple((*pair, ordinal) for pair, group in alike for ordinal, _ in enumerate(group))
    index = {name: i for i, name in enumerate(names)}
    return np.array([index[name] for name in cluster], dtype=np.int64), keys


def affordable(points: int, most: int = RESAMPLES) -> int:
    """Return how many resamples are made of so many points: `most`, or fewer of more than some 20,000 points."""
    return min(most, max(FEWEST_RESAMPLES, WORK // max(1, points)))


def choose_scheme(fits: Sequence[Fitted], count: int, seed: int) -> Scheme:
    """Return `cluster` if all architectures have many series, and 3 sizes in each draw of them, else `mixed` or `wild`.

    All architectures use one scheme, so that their draws pair.
    """
    if all(len(fit.keys) >= MANY_CLUSTERS and _sizes_drawn(fit, count, seed) >= FEWEST_SIZES for fit in fits):
        return "cluster"
    return "wild" if _neighbours_alike(fits, seed) else "mixed"


def _sizes_drawn(fit: Fitted, count: int, seed: int) -> int:
    """Return the fewest sizes in any draw of an architecture's series."""
    draws = _draw_counts(fit.keys, count, seed)
    rung = np.array([key[0] for key in fit.keys])
    order = np.argsort(rung, kind="stable")
    starts = np.flatnonzero(np.diff(rung[order], prepend=-1))
    return int((np.add.reduceat(draws[:, order], starts, axis=1) > 0).sum(axis=1).min())


def _neighbours_alike(fits: Sequence[Fitted], seed: int) -> bool:
    """Return True if the residuals of neighbouring rows of a series are alike, beyond the mean of their series."""
    products = np.zeros(1 + SHUFFLES)
    rng = np.random.default_rng([seed, 5])
    for fit in fits:
        order = np.lexsort([*fit.problem.z.T[::-1], fit.cluster])
        cluster = fit.cluster[order]
        residual = clipped(fit.residual, robust_scale(fit.residual, len(fit.problem.law.names)))[order]
        residual -= (np.bincount(cluster, residual) / np.bincount(cluster))[cluster]
        alike = cluster[1:] == cluster[:-1]
        products[0] += residual[1:][alike] @ residual[:-1][alike]
        for shuffle in range(1, 1 + max(99, min(SHUFFLES, SHUFFLED // len(residual)))):
            mixed = residual[np.lexsort([rng.random(len(residual)), cluster])]
            products[shuffle] += mixed[1:][alike] @ mixed[:-1][alike]
    shuffled = products[1:][products[1:] != 0]
    return (
        bool(len(shuffled))
        and float((1 + (shuffled >= products[0]).sum()) / (1 + len(shuffled))) < CORRELATED
    )


def resample(fits: Sequence[Fitted], count: int, seed: int, scheme: Scheme | None = None) -> Resamples:
    """Refit `count` resamples of each architecture."""
    scheme = scheme or choose_scheme(fits, count, seed)
    drawn = _drawn(fits, count, seed, scheme)
    joint = fits[0].joint
    if joint is None:
        solver = {fit.architecture: refit(fit, count, own) for fit, own in zip(fits, drawn, strict=True)}
    else:

        def together(rows: NDArray[np.int64]) -> tuple[Array, Array]:
            y, w = (
                np.concatenate(columns, axis=1) for columns in zip(*(own(rows) for own in drawn), strict=True)
            )
            return y, w

        whole = _sliced(partial(refit_shared, joint), together, np.arange(count))
        solver = {fit.architecture: joint.split(whole, fit.part) for fit in fits}
    params, at_bound = {}, {}
    for fit in fits:
        u = solver[fit.architecture]
        params[fit.architecture] = fit.problem.law.to_public(u, fit.problem.centre)
        at_bound[fit.architecture] = float(on_bound(fit.problem, u).any(axis=1).mean())
    paired = len({frozenset(fit.keys) for fit in fits}) == 1
    own = {fit.architecture: one for fit, one in zip(fits, drawn, strict=True)}
    return Resamples(params, at_bound, paired, scheme, seed, own)


def _drawn(fits: Sequence[Fitted], count: int, seed: int, scheme: Scheme) -> list[Drawn]:
    """Return what draws each architecture's resamples; series of one size rung and seed have the same draw."""
    if scheme == "mixed":
        noise = _noise(fits, count, seed)
        return [_with_noise(fit, partial(noise.draw, number)) for number, fit in enumerate(fits)]
    if scheme == "wild":
        return [_with_noise(fit, _wild(fit, count, seed)) for fit in fits]
    return [_reweighted(fit, _draw_counts(fit.keys, count, seed)) for fit in fits]


def _noise(fits: Sequence[Fitted], count: int, seed: int) -> Noise:
    """Return the noise of all fits; a shared parameter is counted once for each, which widens it a little."""
    blocks = [
        Block(fit.residual, fit.slope, fit.cluster, fit.keys, np.log(fit.size), fit.problem.weight)
        for fit in fits
    ]
    return noise_of(blocks, count, seed)


def noisy_losses(fit: Fitted, drawn: Resamples, count: int) -> Array:
    """Return log losses of the law plus noise (count, points), for statistics that need no refit.

    They are those of the resamples, but where whole series were drawn: then residuals take random factors.
    """
    rows = np.arange(count)
    if drawn.scheme == "cluster":
        return _with_noise(fit, _wild(fit, count, drawn.seed))(rows)[0]
    return drawn.drawn[fit.architecture](rows)[0]


def _with_noise(fit: Fitted, noise: Callable[[NDArray[np.int64]], Array]) -> Drawn:
    base = fit.problem.y - fit.residual
    return lambda rows: (base + noise(rows), np.tile(fit.problem.weight, (len(rows), 1)))


def _reweighted(fit: Fitted, draws: NDArray[np.int64]) -> Drawn:
    return lambda rows: (
        np.tile(fit.problem.y, (len(rows), 1)),
        draws[rows][:, fit.cluster] * fit.problem.weight,
    )


def _sliced(refit: Callable[[Array, Array], Array], drawn: Drawn, rows: NDArray[np.int64]) -> Array:
    """Refit some resamples in slices, which bounds the memory for any number of points."""
    points = drawn(rows[:1])[0].shape[1]
    size = max(FEWEST_AT_ONCE, SLICE // points)
    slices = [rows[start : start + size] for start in range(0, len(rows), size)]
    return np.concatenate([refit(*drawn(part)) for part in slices])


def refit(fit: Fitted, count: int, drawn: Drawn) -> Array:
    """Refit `count` resamples: (resamples, parameters of the solver).

    All start at the point estimate. Some are started again at its rivals and at a projected grid. If any of those ends
    lower, or if the point estimate has rivals, all are started again.
    """
    every = np.arange(count)
    warm = _sliced(
        lambda y, w: lowest(fit.problem, y, w, [np.tile(fit.result.u, (len(y), 1))], 1e-6), drawn, every
    )

    def lower(other: Array, rows: NDArray[np.int64], share: float) -> NDArray[np.bool_]:
        """Return a mask of the resamples whose objective is less than `share` of the warm start's."""
        found = []
        for first in range(0, len(rows), FEWEST_AT_ONCE):
            part = slice(first, first + FEWEST_AT_ONCE)
            y, w = drawn(rows[part])
            before = objective_at(fit.problem, warm[rows[part]], y, w)
            found.append(objective_at(fit.problem, other[part], y, w) < before * share)
        return np.concatenate(found)

    again = partial(_start_again, fit)
    if len(fit.result.rivals) == 1:
        asked = np.unique(np.linspace(0, count - 1, max(2, round(STARTED_ELSEWHERE * count))).astype(int))
        if not lower(_sliced(again, drawn, asked), asked, 1 - LOWER).any():
            return warm
    other = _sliced(again, drawn, every)
    return np.where(lower(other, every, 1.0)[:, None], other, warm)


def _start_again(fit: Fitted, y: Array, w: Array) -> Array:
    starts = [np.tile(start, (len(y), 1)) for start in fit.result.rivals[1:3]]
    starts.append(projected_starts(fit.problem, y, w, cells=RESAMPLE_CELLS, keep=1)[:, 0])
    return lowest(fit.problem, y, w, starts, 1e-6)


def interval(values: Array) -> tuple[float, float]:
    """Return the central 95 % of resampled values, by percentiles."""
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _draw_counts(keys: Sequence[Key], count: int, seed: int) -> NDArray[np.int64]:
    """Return how often each cluster is drawn (resamples, clusters); equal for architectures with the same keys."""
    order = sorted(range(len(keys)), key=lambda i: keys[i])
    share = np.full(len(keys), 1 / len(keys))
    drawn = np.random.default_rng([seed, 1]).multinomial(len(keys), share, size=count)
    out = np.empty_like(drawn)
    out[:, order] = drawn
    return out.astype(np.int64)


def _wild(fit: Fitted, count: int, seed: int) -> Callable[[NDArray[np.int64]], Array]:
    """Return the function that draws noise of log losses (rows, points): each series' residuals times a random factor.

    Residuals are corrected for leverage as in CR3 (Bell and McCaffrey 2002), since a fit of five parameters follows
    nearly all the noise of its largest model. Another factor for the whole resample, sqrt(nu / chi2_nu), widens
    normal quantiles to Student's; nu is the number of clusters less the three parameters (E, A, alpha) that only
    differences between clusters identify.
    """
    slope = fit.slope
    residual: Array = np.where(fit.problem.weight > 0, fit.residual, 0.0)
    inverse = np.asarray(np.linalg.pinv(slope), dtype=np.float64)
    for rows in np.split(np.argsort(fit.cluster, kind="stable"), np.cumsum(np.bincount(fit.cluster))[:-1]):
        residual[rows] = _unlevered(residual[rows], slope[rows], inverse[:, rows])
    draws = [np.random.default_rng([seed, 2, *(part + 1 for part in key)]) for key in fit.keys]
    factor = np.column_stack([WEBB[rng.integers(0, 6, count)] for rng in draws])
    freedom = max(2, len(fit.keys) - 3)
    widen = np.sqrt(freedom / np.random.default_rng([seed, 3]).chisquare(freedom, count))

    def noise(rows: NDArray[np.int64]) -> Array:
        out: Array = (widen[rows, None] * factor[rows])[:, fit.cluster] * residual
        return out

    return noise


def _unlevered(residual: Array, slope: Array, inverse: Array) -> Array:
    """Divide a cluster's residuals (rows) by the share of them that the fit leaves over, I - slope @ inverse."""
    if len(residual) <= LARGE_CLUSTER:
        left, axes = np.linalg.eigh(np.eye(len(residual)) - slope @ inverse)
        out: Array = axes @ ((axes.T @ residual) / np.maximum(left, LEVERAGE_FLOOR))
        return out
    # The same by the few directions in which the fit follows the cluster; in all others it leaves everything over.
    basis, triangle = np.linalg.qr(slope)
    share, axes = np.linalg.eigh(triangle @ (inverse @ basis))
    axes = basis @ axes
    gain = 1.0 / np.maximum(1.0 - share, LEVERAGE_FLOOR) - 1.0
    more: Array = axes @ (gain * (axes.T @ residual))
    return residual + more
