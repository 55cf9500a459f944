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
from analysis.fitting.solver import FitResult, Problem, lowest, objective_at, on_bound, projected_starts
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
SLICE = 80_000  # points times resamples processed at once: they fit into a processor's cache


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


def choose_scheme(fits: Sequence[Fitted], count: int, seed: int) -> Scheme:
    """Return `wild` if an architecture has fewer than 8 clusters, or fewer than 3 sizes in some draw of them.

    All architectures use one scheme, so that their draws pair.
    """
    for fit in fits:
        if len(fit.keys) < FEW_CLUSTERS:
            return "wild"
        draws = _draw_counts(fit.keys, count, seed)
        rung = np.array([key[0] for key in fit.keys])
        sizes = sum((draws[:, rung == value].sum(axis=1) > 0).astype(int) for value in set(rung.tolist()))
        if int(np.min(sizes)) < FEWEST_SIZES:
            return "wild"
    return "cluster"


def resample(fits: Sequence[Fitted], count: int, seed: int, scheme: Scheme | None = None) -> Resamples:
    """Refit `count` resamples of each architecture; clusters of one size rung and seed have the same draw."""
    scheme = scheme or choose_scheme(fits, count, seed)
    drawn = []
    for fit in fits:
        rows = len(fit.problem.y)
        if scheme == "wild":
            drawn.append((wild_losses(fit, count, seed), np.ones((count, rows))))
        else:
            draws = _draw_counts(fit.keys, count, seed)
            drawn.append((np.tile(fit.problem.y, (count, 1)), draws[:, fit.cluster].astype(np.float64)))
    joint = fits[0].joint
    if joint is None:
        solver = {fit.architecture: refit(fit, y, w) for fit, (y, w) in zip(fits, drawn, strict=True)}
    else:
        y, w = (np.concatenate(columns, axis=1) for columns in zip(*drawn, strict=True))
        whole = _sliced(partial(refit_shared, joint), y, w)
        solver = {fit.architecture: joint.split(whole, fit.part) for fit in fits}
    params, at_bound = {}, {}
    for fit in fits:
        u = solver[fit.architecture]
        params[fit.architecture] = fit.problem.law.to_public(u, fit.problem.centre)
        at_bound[fit.architecture] = float(on_bound(fit.problem, u).any(axis=1).mean())
    paired = len({frozenset(fit.keys) for fit in fits}) == 1
    return Resamples(params, at_bound, paired, scheme, seed)


def _sliced(refit: Callable[[Array, Array], Array], y: Array, w: Array) -> Array:
    """Refit y, w (resamples, points) in slices, which bounds the memory for any number of points."""
    rows = max(20, SLICE // y.shape[1])
    slices = [slice(start, start + rows) for start in range(0, len(y), rows)]
    return np.concatenate([refit(y[part], w[part]) for part in slices])


def refit(fit: Fitted, y: Array, w: Array) -> Array:
    """Refit log losses y with weights w (resamples, points): (resamples, parameters of the solver).

    All start at the point estimate. Some are started again at its rivals and at a projected grid. If any of those ends
    lower, or if the point estimate has rivals, all are started again.
    """
    warm = _sliced(lambda y, w: lowest(fit.problem, y, w, [np.tile(fit.result.u, (len(y), 1))], 1e-6), y, w)
    again = partial(_start_again, fit)
    if len(fit.result.rivals) == 1:
        asked = np.unique(np.linspace(0, len(y) - 1, max(2, round(STARTED_ELSEWHERE * len(y)))).astype(int))
        tried = _sliced(again, y[asked], w[asked])
        before = objective_at(fit.problem, warm[asked], y[asked], w[asked])
        after = objective_at(fit.problem, tried, y[asked], w[asked])
        if not (after < before * (1 - LOWER)).any():
            return warm
    other = _sliced(again, y, w)
    lower = objective_at(fit.problem, other, y, w) < objective_at(fit.problem, warm, y, w)
    return np.where(lower[:, None], other, warm)


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
    problem = fit.problem
    loss, jacobian = problem.law.predict_with_jacobian(fit.result.u[None], problem.z)
    base = np.log(loss[0])
    slope = jacobian[0] / loss[0][:, None]
    inverse = np.linalg.pinv(slope)
    residual = problem.y - base
    for number in range(len(fit.keys)):
        rows = np.flatnonzero(fit.cluster == number)
        left, axes = np.linalg.eigh(np.eye(len(rows)) - slope[rows] @ inverse[:, rows])
        residual[rows] = axes @ ((axes.T @ residual[rows]) / np.maximum(left, LEVERAGE_FLOOR))
    draws = [np.random.default_rng([seed, 2, *(part + 1 for part in key)]) for key in fit.keys]
    factor = np.column_stack([WEBB[rng.integers(0, 6, count)] for rng in draws])
    freedom = max(2, len(fit.keys) - 3)
    widen = np.sqrt(freedom / np.random.default_rng([seed, 3]).chisquare(freedom, count))
    out: Array = base + (widen[:, None] * factor)[:, fit.cluster] * residual
    return out
