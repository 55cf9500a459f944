"""A smooth surface of log loss over size and data, without a law: a penalised polynomial in a mixed model.

log L = f(ln N, ln D) + series + row, for each architecture. f is a polynomial of total degree DEGREE in the scaled
logarithms (Legendre products). Its quadratic part is free. The rest has a Gaussian prior whose precision is the energy
of the third derivatives, as in a thin-plate spline of order 3 (Wood 2017, Generalized Additive Models, section 5.5).
Intervals under such a prior also hold the bias of smoothing (Nychka 1988, doi 10.1080/01621459.1988.10478711).

All architectures share the weight of the prior, the share of the noise that a whole series has in common, and the power
of N by which noise grows towards small sizes. These lie on a grid with the restricted likelihood of each cell. A draw
takes a cell by that likelihood, the noise by its chi-square and the coefficients by their normal distribution, so that
intervals from few series widen as Student's do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import comb

import numpy as np
from numpy.polynomial import legendre
from numpy.typing import NDArray

from analysis.fitting.scale import robust_scale
from analysis.laws.law import Array

DEGREE = 5
FREE = 2  # degree of the part without a prior
ROUGHNESS = np.geomspace(0.1, 1e4, 40)  # deviation of the rest by its prior, in those of a row's noise
TYPICAL, WITHIN = 0.008, 1.5
"""Usual deviation of the rest, and the factor of its own deviation: it is relative to that of the log loss over the
points, and for the mean square of their ranges in ln N and ln D. Additive laws have 0.001 of the square, from ranges of
4 to those of 1000, and the coupled one 0.0025. The surface is made to smooth less."""
SHARED = np.geomspace(0.05, 8.0, 8)  # deviation of a series, in those of a row
GROWTH = np.linspace(-0.3, 0.6, 7)  # noise grows as (mean size / size) to this power
GROWN = 0.15  # deviation of that power by its prior
FAR = 3.0  # deviations beyond which a row loses weight, by the fourth power
LEAST = 1e-4  # deviation of log loss: no residual as small as this is an outlier
ALIKE = float(np.log(1.03))  # sizes and data that differ by less count as one
COLLINEAR = 1e-5  # least singular value of the free part over the largest

Terms = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Rows:
    """Points of an architecture: ln N and ln D (points, 2), log loss, and the number of the series of each."""

    logs: Array
    y: Array
    cluster: NDArray[np.int64]


@dataclass(frozen=True)
class Surface:
    """Coefficients (1 + draws, terms) of an architecture's log loss, first the estimate.

    `low` and `high` are the logarithms that the polynomials map to -1 and 1.
    """

    low: Array
    high: Array
    terms: Terms
    coefficients: Array

    def log_loss(self, logs: Array) -> Array:
        """Return the log loss (1 + draws, points) at ln N and ln D (points, 2)."""
        out: Array = self.coefficients @ _basis(logs, self.low, self.high, self.terms).T
        return out


def surfaces(arms: Sequence[Rows], count: int, seed: int) -> list[Surface] | str:
    """Fit the surfaces of architectures with `count` draws; return a reason if the points do not determine them."""
    logs = np.concatenate([rows.logs for rows in arms])
    low, high = logs.min(axis=0), logs.max(axis=0)
    sizes, data = (min(_distinct(rows.logs[:, axis]) for rows in arms) for axis in (0, 1))
    if sizes <= FREE:
        return f"an architecture was trained at fewer than {FREE + 1} sizes"
    terms = _terms(data)
    free = [place for place, term in enumerate(terms) if sum(term) <= FREE]
    bases = [_basis(rows.logs, low, high, terms) for rows in arms]
    for basis in bases:
        if len(basis) < len(free) + 2:
            return f"an architecture has fewer than {len(free) + 2} points"
        stretch = np.linalg.svd(basis[:, free], compute_uv=False)
        if stretch[-1] < COLLINEAR * stretch[0]:
            return "size and data of an architecture vary together"
    typical = TYPICAL * float(np.mean((high - low) ** 2))

    def fitted(weights: Sequence[Array]) -> tuple[list[_Sums], _Posterior]:
        mean = float(logs[:, 0].mean())
        sums = [_Sums.of(*one, mean) for one in zip(bases, arms, weights, strict=True)]
        return sums, _Posterior.of(sums, terms, typical)

    first = [_first_weights(basis[:, free], rows.y) for basis, rows in zip(bases, arms, strict=True)]
    sums, posterior = fitted(first)
    residuals = [rows.y - basis @ at for rows, basis, at in zip(arms, bases, posterior.mean, strict=True)]
    _, posterior = fitted(
        [_weights(off, posterior.deviation(one)) for off, one in zip(residuals, sums, strict=True)]
    )
    drawn = posterior.draw(count, np.random.default_rng([seed, 7]))
    return [Surface(low, high, terms, coefficients) for coefficients in drawn]


def _distinct(logs: Array) -> int:
    return 1 + int((np.diff(np.unique(logs)) > ALIKE).sum())


def _terms(data: int) -> Terms:
    """Return the degrees in size and data of each term, the free ones first; two budgets show no curvature in data."""
    most = DEGREE if data > FREE else data - 1
    pairs = (pair for pair in product(range(DEGREE + 1), range(most + 1)) if sum(pair) <= DEGREE)
    return tuple(sorted(pairs, key=sum))


def _basis(logs: Array, low: Array, high: Array, terms: Terms) -> Array:
    """Return Legendre products (points, terms) in logarithms scaled to -1 to 1."""
    span = np.where(high > low, high - low, 1.0)
    size, data = (legendre.legvander(2 * (logs[:, j] - low[j]) / span[j] - 1, DEGREE) for j in (0, 1))
    i, j = np.array(terms).T
    out: Array = size[:, i] * data[:, j]
    return out


def _energy(terms: Terms) -> Array:
    """Return the integral of products of third derivatives (terms, terms) over the square."""
    nodes, weight = legendre.leggauss(DEGREE + 1)
    powers = []
    for order in range(4):
        bent = [legendre.legval(nodes, legendre.legder(unit, order)) for unit in np.eye(DEGREE + 1)]
        powers.append(np.array(bent) * np.sqrt(weight))
    one = [values @ values.T for values in powers]
    i, j = np.array(terms).T
    parts = (comb(3, k) * one[k][np.ix_(i, i)] * one[3 - k][np.ix_(j, j)] for k in range(4))
    out: Array = np.sum(list(parts), axis=0)
    return out


def _first_weights(free: Array, y: Array) -> Array:
    """Return weights by residuals of least absolute deviations from the free part."""
    weight = np.ones(len(y))
    for _ in range(30):
        weighted = free.T * weight
        residual = y - free @ np.linalg.lstsq(weighted @ free, weighted @ y, rcond=None)[0]
        weight = 1.0 / np.maximum(np.abs(residual), 1e-6)
    return _weights(residual, np.full(len(y), robust_scale(residual, free.shape[1])))


def _weights(residual: Array, deviation: Array) -> Array:
    far = FAR * np.maximum(deviation, LEAST) / np.maximum(np.abs(residual), 1e-300)
    out: Array = np.minimum(1.0, far) ** 4
    return out


@dataclass(frozen=True)
class _Sums:
    """Products of an architecture's basis B and losses y with M, the inverse covariance of noise with unit rows.

    `gram` is B' M B (cells, terms, terms), `pull` B' M y (cells, terms), `square` y' M y (cells) and `det` the log
    determinant of the covariance (cells). The cells are those of GROWTH and SHARED. `far` is ln N less its mean.
    """

    gram: Array
    pull: Array
    square: Array
    det: Array
    count: float
    far: Array
    range: float

    @classmethod
    def of(cls, basis: Array, rows: Rows, weight: Array, mean: float) -> _Sums:
        """Sum the weighted rows of an architecture; `mean` is the ln N at which rows have unit noise."""
        joined = np.column_stack([basis, rows.y])
        of_series = np.bincount(rows.cluster, weight)
        share = SHARED[:, None] ** 2 / (1 + SHARED[:, None] ** 2 * of_series)
        far = rows.logs[:, 0] - mean
        order = np.argsort(rows.cluster, kind="stable")
        starts = np.flatnonzero(np.diff(rows.cluster[order], prepend=-1))
        grams, dets = [], []
        for growth in GROWTH:
            grown = joined * np.exp(growth * far)[:, None]
            series = np.add.reduceat((weight[:, None] * grown)[order], starts, axis=0)
            whole = grown.T @ (weight[:, None] * grown)
            grams.append(whole - np.einsum("cs,si,sj->cij", share, series, series, optimize=True))
            dets.append(np.log1p(SHARED[:, None] ** 2 * of_series).sum(axis=1) - 2 * growth * (weight @ far))
        gram = np.concatenate(grams)
        return cls(
            gram[:, :-1, :-1],
            gram[:, :-1, -1],
            gram[:, -1, -1],
            np.concatenate(dets),
            weight.sum(),
            far,
            float(np.sqrt(np.cov(rows.y, aweights=weight))),
        )


@dataclass(frozen=True)
class _Posterior:
    """Likelihood of the cells of noise and roughness by all architectures, and the coefficients of each at every cell.

    `log` is the log likelihood (cells, roughness), `spread` the sum of squares (cells, roughness), `freedom` its
    degrees of freedom. The covariance of coefficients is root' diag(1/eigen) root times the noise, their centre root'
    (turned / eigen): `root` is (architectures, cells, terms, terms), `turned` (architectures, cells, terms) and
    `eigen` (architectures, cells, roughness, terms).
    """

    log: Array
    spread: Array
    freedom: float
    root: Array
    turned: Array
    eigen: Array

    @classmethod
    def of(cls, sums: Sequence[_Sums], terms: Terms, typical: float) -> _Posterior:
        """Join the architectures; `typical` is the usual deviation of the rest, in those of the log loss."""
        free = sum(sum(term) <= FREE for term in terms)
        energy = _energy(terms)
        norm = [1 / ((2 * i + 1) * (2 * j + 1)) for i, j in terms[free:]]
        energy *= float(np.diag(np.linalg.inv(energy[free:, free:])) @ norm)
        freedom = sum(one.count for one in sums) - free * len(sums)
        spread = np.zeros((len(sums[0].gram), len(ROUGHNESS)))
        det = np.tile(2.0 * len(sums) * (len(terms) - free) * np.log(ROUGHNESS), (len(spread), 1))
        roots, turns, eigens = [], [], []
        for one in sums:
            # gram + energy / roughness^2 at every roughness, by the eigenvectors of energy in gram + energy.
            lower = np.linalg.cholesky(one.gram + energy)
            inner = np.linalg.inv(lower)
            share, axes = np.linalg.eigh(inner @ energy @ inner.transpose(0, 2, 1))
            root = axes.transpose(0, 2, 1) @ inner
            turned = np.einsum("cij,cj->ci", root, one.pull)
            eigen = np.maximum(1 - share[:, None], 1e-14) + share[:, None] / ROUGHNESS[:, None] ** 2
            spread += one.square[:, None] - (turned[:, None] ** 2 / eigen).sum(axis=2)
            det += one.det[:, None] + np.log(eigen).sum(axis=2)
            det += 2 * np.log(np.diagonal(lower, axis1=1, axis2=2)).sum(axis=1)[:, None]
            roots.append(root)
            turns.append(turned)
            eigens.append(eigen)
        spread = np.maximum(spread, freedom * 1e-12)
        log = -0.5 * (freedom * np.log(spread) + det)
        # What is known of scaling curves before these: how far they are from quadratic, and that noise grows little.
        usual = typical * float(np.mean([one.range for one in sums]))
        log -= 0.5 * (np.log(ROUGHNESS * np.sqrt(spread / freedom) / usual) / np.log(WITHIN)) ** 2
        log -= 0.5 * (np.repeat(GROWTH, len(SHARED))[:, None] / GROWN) ** 2
        return cls(log, spread, freedom, np.array(roots), np.array(turns), np.array(eigens))

    @property
    def chance(self) -> Array:
        """Probability of each cell (cells, roughness)."""
        chance = np.exp(self.log - self.log.max())
        out: Array = chance / chance.sum()
        return out

    @property
    def mean(self) -> Array:
        """Mean coefficients (architectures, terms)."""
        shrunk = np.einsum("cr,acri->aci", self.chance, 1 / self.eigen) * self.turned
        out: Array = np.einsum("acij,aci->aj", self.root, shrunk)
        return out

    def deviation(self, sums: _Sums) -> Array:
        """Return the standard deviation of the noise of an architecture's rows at the likeliest cell (points)."""
        cell, rough = np.unravel_index(int(np.argmax(self.log)), self.log.shape)
        growth, shared = GROWTH[cell // len(SHARED)], SHARED[cell % len(SHARED)]
        size = np.sqrt(self.spread[cell, rough] / self.freedom * (1 + shared**2))
        out: Array = size * np.exp(-growth * sums.far)
        return out

    def draw(self, count: int, rng: np.random.Generator) -> list[Array]:
        """Return coefficients (1 + count, terms) of each architecture, first their means."""
        cell, rough = np.unravel_index(
            rng.choice(self.log.size, count, p=self.chance.ravel()), self.log.shape
        )
        noise = np.sqrt(self.spread[cell, rough] / rng.chisquare(self.freedom, count))
        out = []
        for mean, root, turned, eigen in zip(self.mean, self.root, self.turned, self.eigen, strict=True):
            kept = eigen[cell, rough]
            off = turned[cell] / kept + noise[:, None] * rng.standard_normal(kept.shape) / np.sqrt(kept)
            out.append(np.vstack([mean, np.einsum("rij,ri->rj", root[cell], off)]))
        return out
