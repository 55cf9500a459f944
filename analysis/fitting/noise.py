"""The noise of a campaign: standard deviations of a series and of a row, with their own uncertainty.

Log losses are law + series effect + row noise, normal, with one standard deviation each for all architectures: a
mixed model. With a seed for each size, the series of one architecture leave two or three degrees of freedom, and only
pooled ones give a useful interval. The residual likelihood (REML, Patterson and Thompson 1971) depends on the residuals
alone and not on the parameters of the law. Its variances are drawn from their posterior under Box and Tiao's prior
(Bayesian Inference in Statistical Analysis, 1973, section 5.2), so that intervals have Student's tails, and a
series effect estimated as zero is not taken for none. Noise may grow towards small sizes as a power of size. Series of
the same size rung and seed saw the same data: as far as the residuals of architectures are surely correlated (the lower
end of a 90 % interval by Fisher's z), so are the draws.

The residuals may be those of any smooth surface that is locally linear in the log losses; points that diverged are left
out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from analysis.fitting.scale import clipped, robust_scale
from analysis.laws.law import Array

Key = tuple[int, int, int]
"""Size rung, seed, ordinal among equals."""

RATIOS = np.concatenate([[0.0], np.geomspace(1e-3, 1e4, 141)])
"""Values of the mean variance of a series, over the variance of a row, between which the posterior is summed."""
GROWTH = np.linspace(-0.3, 0.6, 10)
"""Powers of (1 / size) with which the noise may grow."""
GROWTH_SD = 0.1
FAR = 6.0
"""Robust standard deviations beyond which a residual tells nothing of the noise."""
ONE_SIDED, FEWEST_PAIRS = 1.645, 3
"""Normal quantile of the lower end of the correlation; pairs of series that tell nothing of it."""
QUIETEST, LEAST_SCALE = 0.05, 1e-12
"""Least scale of a block, as a share of the largest, and of any."""
UNLIKE = 2.0
"""Ratio of robust scales from which on architectures keep scales of their own."""


@dataclass(frozen=True)
class Block:
    """Residuals (points) of one fit, the slopes of its log loss by parameters (points, parameters), series and ln N.

    `keys` are the series' own, equal for series of other blocks that saw the same data. `weight` is 0 for points that
    the fit did not use. The points of a series are in the order of their training.
    """

    residual: Array
    slope: Array
    cluster: NDArray[np.int64]
    keys: Sequence[Key]
    log_size: Array
    weight: Array


@dataclass(frozen=True)
class Noise:
    """Draws of (series, row) standard deviations and growth (draws), and the scale of each block's points."""

    series: Array
    row: Array
    growth: Array
    blocks: tuple[_Place, ...]
    correlation: float
    seed: int

    def draw(self, block: int, rows: NDArray[np.int64]) -> Array:
        """Return noise of log losses (rows, points of the block) for the resamples with these numbers."""
        place, which = self.blocks[block], rows % len(self.row)
        shared, own = np.sqrt(self.correlation), np.sqrt(1.0 - self.correlation)
        series, points = np.zeros((len(rows), len(place.key))), np.zeros((len(rows), len(place.key)))
        keys, places = self.keys, self.points
        for number, row in enumerate(rows):
            if shared:
                common = np.random.default_rng([self.seed, 2, 0, int(row)])
                series[number] = shared * common.standard_normal(keys)[place.key]
                points[number] = shared * common.standard_normal(places)[place.point]
            if own:
                alone = np.random.default_rng([self.seed, 2, 1 + block, int(row)])
                series[number] += own * alone.standard_normal(keys)[place.key]
                points[number] += own * alone.standard_normal(len(place.key))
        grown = place.scale * np.exp(-np.outer(self.growth[which], place.log_size))
        out: Array = grown * (self.series[which, None] * series + self.row[which, None] * points)
        return out

    @property
    def keys(self) -> int:
        """Number of different series keys."""
        return 1 + max(int(place.key.max()) for place in self.blocks)

    @property
    def points(self) -> int:
        """Number of different places in series."""
        return 1 + max(int(place.point.max()) for place in self.blocks)


@dataclass(frozen=True)
class _Place:
    """For the points of a block: ln N about the middle, numbers of the series key and of the place in it, the scale."""

    log_size: Array
    key: NDArray[np.int64]
    point: NDArray[np.int64]
    scale: float


def noise_of(blocks: Sequence[Block], count: int, seed: int) -> Noise:
    """Draw `count` times the noise that the residuals of all blocks have left."""
    middle = np.concatenate([block.log_size for block in blocks]).mean()
    sizes = tuple(block.log_size - middle for block in blocks)
    scales = [robust_scale(block.residual[block.weight > 0], block.slope.shape[1]) for block in blocks]
    scales = [max(scale, QUIETEST * max(scales), LEAST_SCALE) for scale in scales]
    own = [1.0] * len(scales) if max(scales) <= UNLIKE * min(scales) else scales
    kept = [
        _kept(block, size, scale, FAR * most)
        for block, size, scale, most in zip(blocks, sizes, own, scales, strict=True)
    ]
    several = len(np.unique(np.concatenate(sizes).round(6))) >= 3
    growth = GROWTH if several else np.zeros(1)
    parts = [_likelihood(kept, float(power)) for power in growth]
    log = np.stack([part[0] for part in parts]) - 0.5 * (growth[:, None] / GROWTH_SD) ** 2
    chance = np.exp(log - log.max()).ravel()
    rng = np.random.default_rng([seed, 3])
    drawn = rng.choice(len(chance), count, p=chance / chance.sum())
    power, ratio = np.divmod(drawn, len(RATIOS))
    squares = np.stack([part[1] for part in parts])[power, ratio]
    freedom, unit = parts[0][2], np.array([part[3] for part in parts])[power]
    row = np.sqrt(squares / rng.chisquare(freedom, count))
    places = _places(blocks, sizes, own)
    series = row * np.sqrt(RATIOS[ratio] / unit)
    return Noise(series, row, growth[power], places, _correlation(blocks, places), seed)


def _places(blocks: Sequence[Block], sizes: Sequence[Array], scales: Sequence[float]) -> tuple[_Place, ...]:
    """Number the series keys of all blocks, and the places in their series."""
    keys = {key: number for number, key in enumerate(sorted({key for block in blocks for key in block.keys}))}
    longest = max(int(np.bincount(block.cluster).max()) for block in blocks)
    out = []
    for block, size, scale in zip(blocks, sizes, scales, strict=True):
        key = np.array([keys[one] for one in block.keys])[block.cluster]
        order = np.argsort(block.cluster, kind="stable")
        rows = np.bincount(block.cluster)
        place = np.empty(len(order), dtype=np.int64)
        place[order] = np.arange(len(order)) - (np.cumsum(rows) - rows)[block.cluster[order]]
        out.append(_Place(size, key, key * longest + place, scale))
    return tuple(out)


def _correlation(blocks: Sequence[Block], places: Sequence[_Place]) -> float:
    """Return how far residuals at the same places of several blocks are surely correlated: 0 to 1."""
    products, series = np.zeros(3), 0
    for (one, at), (other, there) in combinations(zip(blocks, places, strict=True), 2):
        _, first, second = np.intersect1d(at.point, there.point, return_indices=True)
        left, right = (
            clipped(block.residual, robust_scale(block.residual, block.slope.shape[1]))[rows] / place.scale
            for block, place, rows in ((one, at, first), (other, there, second))
        )
        products += [left @ right, left @ left, right @ right]
        series += len(np.unique(at.key[first]))
    if series <= FEWEST_PAIRS or products[1] * products[2] == 0:
        return 0.0
    correlation = float(np.clip(products[0] / np.sqrt(products[1] * products[2]), -1.0, 1.0))
    with np.errstate(divide="ignore"):
        lower = np.tanh(np.arctanh(correlation) - ONE_SIDED / np.sqrt(series - FEWEST_PAIRS))
    return float(np.clip(lower, 0.0, 1.0))


def _kept(block: Block, log_size: Array, scale: float, most: float) -> Block:
    """Return the points of residuals up to `most`, which tell of the noise, in units of `scale`."""
    use = (block.weight > 0) & (np.abs(block.residual) <= most)
    return replace(
        block,
        residual=block.residual[use] / scale,
        slope=block.slope[use],
        cluster=block.cluster[use],
        log_size=log_size[use],
    )


def _likelihood(blocks: Sequence[Block], power: float) -> tuple[Array, Array, int, float]:
    """Return log posterior and weighted sum of squares (ratios), degrees of freedom, and the mean of the eigenvalues.

    With Z the indicators of series and H the projection on the slopes, Z'(I - H)Z has eigenvalues l: along its axes the
    variance is row^2 + l series^2, and row^2 along all others.
    """
    values, along = [], []
    squares, rest, constant = 0.0, 0, 0.0
    for block in blocks:
        grown = np.exp(-power * block.log_size)
        residual = block.residual / grown
        unit_slope = block.slope / np.maximum(np.linalg.norm(block.slope, axis=0), 1e-300)
        basis, singular = _basis(unit_slope / grown[:, None])
        rank = len(singular)
        residual = residual - basis @ (basis.T @ residual)
        constant -= float(np.log(grown).sum()) + float(np.log(singular).sum())
        names, which = np.unique(block.cluster, return_inverse=True)
        sums = np.zeros((len(names), rank))
        np.add.at(sums, which, basis)
        inner = np.diag(np.bincount(which).astype(np.float64)) - sums @ sums.T
        eigen, axes = np.linalg.eigh(inner)
        use = eigen > 1e-8 * max(1.0, float(eigen[-1]))
        part = (axes[:, use].T @ np.bincount(which, residual)) / np.sqrt(eigen[use])
        values.append(eigen[use])
        along.append(part)
        squares += float(residual @ residual - part @ part)
        rest += len(residual) - rank - int(use.sum())
    eigen, part = np.concatenate(values), np.concatenate(along)
    unit = float(eigen.mean()) if len(eigen) else 1.0
    stretched = 1.0 + np.outer(RATIOS, eigen / unit)
    weighted = np.maximum(squares, 0.0) + (part**2 / stretched).sum(axis=1) + 1e-18
    freedom = max(1, rest + len(part))
    # Uniform in ln(1 + ratio): the widths of the cells of the sum, times the prior 1 / (1 + ratio).
    width = np.gradient(np.log1p(RATIOS))
    log = np.log(width) - 0.5 * np.log(stretched).sum(axis=1) - 0.5 * freedom * np.log(weighted) + constant
    return log, weighted, freedom, unit


def _basis(slope: Array) -> tuple[Array, Array]:
    """Return an orthonormal basis of the columns (points, rank) and their singular values (rank)."""
    left, values, _ = np.linalg.svd(slope, full_matrices=False)
    rank = int((values > 1e-10 * values[0]).sum())
    return left[:, :rank], values[:rank]
