"""Grids of a study: their choices and costs, their points without losses, and the variance of their size ratio.

The closed-form variance compares thousands of grids in seconds. It is the sandwich of least squares, of which Huber's
estimator reaches 95 %, widened as Student's quantiles are for the series that tell of the noise, so that a grid of few
series does not look good.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.design.prior import Noise, Prior
from analysis.design.simulate import grid_of
from analysis.findings.equal_loss import SizeRatio
from analysis.laws.law import Array
from analysis.points.table import CheckedPoints

COLUMNS = ("architecture", "n_params", "tokens", "iterations", "seed", "cluster", "run_id")
MAX_SEEDS = 12
EFFICIENCY = 0.95  # of Huber's estimator under normal noise
SIZE_PARAMETERS, PARAMETERS = (
    3,
    5,
)  # of the additive law: those that differences between series identify, and all
LEAST_FREEDOM = 2.2  # degrees of freedom of the noise; with two the variance of Student's t is infinite
STEP = 1e-4
NEARLY_NOTHING = 1e-12


@dataclass(frozen=True)
class Rung:
    """A size of one architecture that could be trained."""

    architecture: str
    size: str
    n_params: float
    tokens_an_iteration: float


@dataclass(frozen=True)
class Space:
    """The sizes and iteration counts from which grids are made, with their cost.

    Every architecture has all sizes, under the same names, in ascending order. `hours(architecture, size, iterations,
    seed)` returns the GPU-hours of one series trained to these iteration counts, less the part that has been trained.
    """

    rungs: tuple[Rung, ...]
    iterations: tuple[int, ...]
    hours: Callable[[str, str, Sequence[int], int], float]
    shares_trunk: bool = True

    @property
    def sizes(self) -> tuple[str, ...]:
        """Names of the sizes, the smallest first."""
        return tuple(dict.fromkeys(rung.size for rung in self.rungs))

    @property
    def architectures(self) -> tuple[str, ...]:
        """Names in sorted order."""
        return tuple(sorted({rung.architecture for rung in self.rungs}))

    def cost_of_seeds(self, iterations: Sequence[int]) -> Array:
        """Return the GPU-hours (sizes, MAX_SEEDS) of each seed of a size, summed over architectures."""

        def cost(size: str, seed: int) -> float:
            return sum(self.hours(name, size, iterations, seed) for name in self.architectures)

        return np.array([[cost(size, seed) for seed in range(MAX_SEEDS)] for size in self.sizes])


@dataclass(frozen=True)
class Grid:
    """Iteration counts, and the number of seeds of each size of a space."""

    iterations: tuple[int, ...]
    seeds: tuple[int, ...]

    def gpu_hours(self, space: Space) -> float:
        """Return the cost of the grid in GPU-hours."""
        return float(self.gpu_hours_of_sizes(space).sum())

    def gpu_hours_of_sizes(self, space: Space) -> Array:
        """Return the GPU-hours of each size of the space (sizes)."""
        return spent(space.cost_of_seeds(self.iterations), np.array(self.seeds))

    def points(self, space: Space) -> CheckedPoints:
        """Return the points of the grid; their losses are not known yet."""
        seeds = dict(zip(space.sizes, self.seeds, strict=True))
        rows: list[Sequence[object]] = []
        for rung in space.rungs:
            for seed in range(seeds[rung.size]):
                series = f"{rung.architecture}-{rung.size}-{seed}"
                for iterations in self.iterations:
                    run = f"{series}-{iterations}"
                    tokens = iterations * rung.tokens_an_iteration
                    cluster = series if space.shares_trunk else run
                    rows.append((rung.architecture, rung.n_params, tokens, iterations, seed, cluster, run))
        return grid_of(COLUMNS, rows, "proposed")


def spent(cost: Array, seeds: Array) -> Array:
    """Return the GPU-hours (sizes) of the first `seeds` (sizes) of each size, by the `cost` (sizes, MAX_SEEDS)."""
    out: Array = np.where(np.arange(cost.shape[1]) < seeds[:, None], cost, 0.0).sum(axis=1)
    return out


def spelled(space: Space, grid: Grid) -> dict[str, Any]:
    """Return a grid as the keys of a study's `grid`; sizes with more seeds than the others become `replicates`."""
    kept = {size: number for size, number in zip(space.sizes, grid.seeds, strict=True) if number}
    fewest = min(kept.values())
    more: dict[int, list[str]] = {}
    for size, number in kept.items():
        if number > fewest:
            more.setdefault(number, []).append(size)
    return {
        "sizes": list(kept),
        "iterations": list(grid.iterations),
        "seeds": list(range(fewest)),
        "replicates": [
            {"sizes": sizes, "seeds": list(range(fewest, number))} for number, sizes in sorted(more.items())
        ],
    }


@dataclass(frozen=True)
class Sensitivity:
    """Derivatives of log losses and log ratios by the parameters of all architectures, for one set of iterations.

    `slopes` is (cells, lengths, parameters), where a cell is one size of one architecture; `targets` is (ratios,
    parameters). `size` is the index of each cell's size.
    """

    slopes: Array
    targets: Array
    size: Array
    noise: Noise

    def variance(self, seeds: Array) -> Array:
        """Return the variance of the log ratios, summed (grids), for grids of `seeds` (grids, sizes)."""
        weight = seeds[:, self.size]
        cells, lengths, width = self.slopes.shape
        gram = self.slopes.transpose(0, 2, 1) @ self.slopes
        bread = (weight @ gram.reshape(cells, -1)).reshape(-1, width, width)
        scale = np.sqrt(np.maximum(np.einsum("gpp->gp", bread), 1e-300))
        scale = scale[:, :, None] * scale[:, None, :]
        # A direction that no seed measures has infinite variance; a very large one serves as well.
        inverse = np.linalg.inv(bread / scale + NEARLY_NOTHING * np.eye(width)) / scale
        pull = self.slopes[None] @ inverse[:, None] @ self.targets.T
        meat = self.noise.run**2 * np.eye(lengths) + self.noise.series**2
        each = (pull * (meat @ pull)).sum(axis=(2, 3))
        freedom = np.maximum(weight.sum(axis=1) - SIZE_PARAMETERS / PARAMETERS * width, LEAST_FREEDOM)
        out: Array = (weight * each).sum(axis=1) / EFFICIENCY * freedom / (freedom - 2)
        return np.where(np.isfinite(out) & (out > 0), out, np.inf)


def sensitivity(
    space: Space, iterations: Sequence[int], prior: Prior, truth: Sequence[SizeRatio], reference: str
) -> Sensitivity:
    """Return the derivatives at the sizes of the space, and at the law's data input for each iteration count."""
    names = space.architectures
    law = prior.law
    width = len(law.names)
    shared = [law.names.index(name) for name in law.shared]
    rates = {rung.architecture: rung.tokens_an_iteration for rung in space.rungs}
    counts = np.array(iterations, dtype=np.float64)
    inputs = {name: counts * (1.0 if law.counts_iterations else rates[name]) for name in names}
    sizes = {name: [rung.n_params for rung in space.rungs if rung.architecture == name] for name in names}
    logs = {
        name: np.array([[[np.log(n), np.log(d)] for d in inputs[name]] for n in sizes[name]])
        for name in names
    }
    centre = np.concatenate([cells.reshape(-1, 2) for cells in logs.values()]).mean(axis=0)
    u = {name: law.to_solver(prior.row(name), centre) for name in names}

    def spread(values: Array, part: int) -> Array:
        """Place derivatives by an architecture's own parameters among those of all architectures."""
        out = np.zeros((*values.shape[:-1], width * len(names)))
        for j in range(width):
            out[..., (0 if j in shared else part) * width + j] = values[..., j]
        return out

    slopes, size = [], []
    for part, name in enumerate(names):
        cells = logs[name]
        loss, jacobian = law.predict_with_jacobian(u[name], (cells - centre).reshape(-1, 2))
        relative = (jacobian[0] / loss[0][:, None]).reshape(*cells.shape[:2], width)
        slopes.append(spread(relative, part))
        size += list(range(len(cells)))
    targets = []
    for row in truth:
        if row.n_params is None:
            continue
        at = {
            name: np.log(
                [n_params, (row.iterations or 0.0) * (1.0 if law.counts_iterations else rates[name])]
            )
            - centre
            for name, n_params in ((row.architecture, row.n_params), (reference, row.reference_n_params))
        }
        gradient = {name: law.predict_with_jacobian(u[name], z[None])[1][0, 0] for name, z in at.items()}
        z = at[row.architecture]
        aside = np.array([STEP, 0.0])
        ends = law.predict(u[row.architecture], np.stack([z + aside, z - aside]))[0]
        fall = (ends[0] - ends[1]) / (2 * STEP)
        own, other = (spread(gradient[name], names.index(name)) for name in (row.architecture, reference))
        targets.append((own - other) / fall)
    every = np.concatenate(slopes)
    used = np.abs(every).max(axis=(0, 1)) > 0  # a shared parameter has one place, and leaves the others empty
    # Runs without a common trunk have independent noise.
    noise = prior.noise if space.shares_trunk else Noise(0.0, prior.noise.total)
    return Sensitivity(every[:, :, used], np.array(targets)[:, used], np.array(size), noise)
