"""Intervals of a fit from resamples of whole clusters.

Rows of one training run share its seed and its trunk, so clusters are resampled and never rows (on the Gemstones points
that triples the standard deviation of alpha). With few clusters many resamples would contain only two sizes, to which
no law can be fitted. Then a wild cluster bootstrap keeps all rows and multiplies the residuals of each cluster by a
random factor (Cameron, Gelbach and Miller 2008, doi 10.1162/rest.90.3.414; Webb 2023, doi 10.1111/caje.12661).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Literal

import numpy as np
from numpy.typing import NDArray

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

Scheme = Literal["cluster", "wild"]
Key = tuple[int, int, int]  # size rung, seed, ordinal among equals: it pairs clusters of architectures

FEW_CLUSTERS = 8
FEWEST_SIZES = 3
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


@dataclass(frozen=True)
class Resamples:
    """Parameters of every refit (resamples, parameters) by architecture; row r is the same draw for all of them."""

    params: Mapping[str, Array]
    at_bound: Mapping[str, float]  # share of resamples with a parameter on a bound
    paired: bool
    scheme: Scheme
    seed: int

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
    """Return `wild` if an architecture has fewer than 8 clusters, or fewer than 3 sizes in some draw of them.

    All architectures use one scheme, so that their draws pair.
    """
    for fit in fits:
        if len(fit.keys) < FEW_CLUSTERS:
            return "wild"
        draws = _draw_counts(fit.keys, count, seed)
        rung = np.array([key[0] for key in fit.keys])
        order = np.argsort(rung, kind="stable")
        starts = np.flatnonzero(np.diff(rung[order], prepend=-1))
        sizes = (np.add.reduceat(draws[:, order], starts, axis=1) > 0).sum(axis=1)
        if int(np.min(sizes)) < FEWEST_SIZES:
            return "wild"
    return "cluster"


def resample(fits: Sequence[Fitted], count: int, seed: int, scheme: Scheme | None = None) -> Resamples:
    """Refit `count` resamples of each architecture; clusters of one size rung and seed have the same draw."""
    scheme = scheme or choose_scheme(fits, count, seed)
    drawn = [_drawn(fit, count, seed, scheme) for fit in fits]
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
    return Resamples(params, at_bound, paired, scheme, seed)


def _drawn(fit: Fitted, count: int, seed: int, scheme: Scheme) -> Drawn:
    if scheme == "wild":
        losses = _wild(fit, count, seed)
        return lambda rows: (losses(rows), np.ones((len(rows), len(fit.problem.y))))
    draws = _draw_counts(fit.keys, count, seed)
    return lambda rows: (
        np.tile(fit.problem.y, (len(rows), 1)),
        draws[rows][:, fit.cluster].astype(np.float64),
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


def wild_losses(fit: Fitted, count: int, seed: int) -> Array:
    """Return resampled log losses (resamples, points): the fit plus each cluster's residuals times a random factor.

    Residuals are corrected for leverage as in CR3 (Bell and McCaffrey 2002), since a fit of five parameters follows
    nearly all the noise of its largest model. Another factor for the whole resample, sqrt(nu / chi2_nu), widens
    normal quantiles to Student's; nu is the number of clusters less the three parameters (E, A, alpha) that only
    differences between clusters identify.
    """
    return _wild(fit, count, seed)(np.arange(count))


def _wild(fit: Fitted, count: int, seed: int) -> Callable[[NDArray[np.int64]], Array]:
    """Return the function that makes some of the rows of `wild_losses`."""
    problem = fit.problem
    loss, jacobian = problem.law.predict_with_jacobian(fit.result.u[None], problem.z)
    base = np.log(loss[0])
    slope = jacobian[0] / loss[0][:, None]
    inverse = np.linalg.pinv(slope)
    residual = problem.y - base
    for rows in np.split(np.argsort(fit.cluster, kind="stable"), np.cumsum(np.bincount(fit.cluster))[:-1]):
        residual[rows] = _unlevered(residual[rows], slope[rows], inverse[:, rows])
    draws = [np.random.default_rng([seed, 2, *(part + 1 for part in key)]) for key in fit.keys]
    factor = np.column_stack([WEBB[rng.integers(0, 6, count)] for rng in draws])
    freedom = max(2, len(fit.keys) - 3)
    widen = np.sqrt(freedom / np.random.default_rng([seed, 3]).chisquare(freedom, count))

    def losses(rows: NDArray[np.int64]) -> Array:
        out: Array = base + (widen[rows, None] * factor[rows])[:, fit.cluster] * residual
        return out

    return losses


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
