"""Grids of a study: what one may be made of and costs, its points without losses, and the variance of its size ratio.

The variance in closed form tells thousands of grids apart in seconds. Huber's estimator far within its noise is nearly
the least absolute one, whose sandwich has the covariance of the clipped noise as its meat; within a series that is the
arcsine of the losses' correlation. What a cluster pulls the fit towards itself is put back as the bootstrap puts it
back (CR3, Bell and McCaffrey 2002), so that a grid that hangs on one series is not taken for a good one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
# Share of a series' pull on the fit that is put back: all of it would explode where one alone decides.
LEVERAGE = 0.9
STEP = 1e-4
NEARLY_NOTHING = 1e-12


@dataclass(frozen=True)
class Rung:
    """A size of one architecture as it could be trained."""

    architecture: str
    size: str
    n_params: float
    tokens_an_iteration: float


@dataclass(frozen=True)
class Space:
    """The sizes, iteration counts and seeds that a grid may be made of, with their cost.

    Every architecture has every size, named alike, in ascending order. `hours(architecture, size, iterations, seed)` is
    the cost in GPU-hours of one series trained to each of these iteration counts, less what has been trained.
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
        """GPU-hours (sizes, MAX_SEEDS) of each seed of a size, all architectures together."""
        return np.array(
            [
                [
                    sum(self.hours(name, size, iterations, seed) for name in self.architectures)
                    for seed in range(MAX_SEEDS)
                ]
                for size in self.sizes
            ]
        )


@dataclass(frozen=True)
class Grid:
    """Iteration counts, and for each size of a space how many seeds it is trained with."""

    iterations: tuple[int, ...]
    seeds: tuple[int, ...]

    def gpu_hours(self, space: Space) -> float:
        """Return its cost in GPU-hours."""
        return float(self.gpu_hours_of_sizes(space).sum())

    def gpu_hours_of_sizes(self, space: Space) -> Array:
        """Return the GPU-hours of each size of the space (sizes)."""
        return spent(space.cost_of_seeds(self.iterations), np.array(self.seeds))

    def points(self, space: Space) -> CheckedPoints:
        """The points it would give, before they have losses."""
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
        return grid_of(COLUMNS, list(enumerate(rows, start=1)), "proposed")


def spent(cost: Array, seeds: Array) -> Array:
    """GPU-hours (sizes) of the first so many seeds of each size, by the cost of each (sizes, MAX_SEEDS)."""
    out: Array = np.where(np.arange(cost.shape[1]) < seeds[:, None], cost, 0.0).sum(axis=1)
    return out


def spelled(space: Space, grid: Grid) -> dict[str, Any]:
    """A grid as keys of a study's `grid`: sizes by name, iterations, seeds, and replicates of the sizes with more."""
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
    """Derivatives, by the parameters of all architectures, of the log losses and the ratio at one set of counts.

    `slopes` is (cells, lengths, parameters), a cell being an architecture's size; `targets` has a row a ratio. `size`
    is the index of each cell's size.
    """

    slopes: Array
    targets: Array
    size: Array
    noise: Noise

    def variance(self, seeds: Array) -> Array:
        """Summed variance of the logarithms of the ratios (grids) for grids of `seeds` (grids, sizes)."""
        weight = seeds[:, self.size]
        cells, lengths, width = self.slopes.shape
        gram = self.slopes.transpose(0, 2, 1) @ self.slopes
        bread = (weight @ gram.reshape(cells, -1)).reshape(-1, width, width)
        scale = np.sqrt(np.maximum(np.einsum("gpp->gp", bread), 1e-300))
        scale = scale[:, :, None] * scale[:, None, :]
        # What no seed speaks of has a variance without bounds, and this much is as good.
        inverse = np.linalg.inv(bread / scale + NEARLY_NOTHING * np.eye(width)) / scale
        toward = self.slopes[None] @ inverse[:, None]
        hat = toward @ self.slopes.transpose(0, 2, 1)[None]
        pull = toward @ self.targets.T
        loose = np.linalg.solve(np.eye(lengths) - LEVERAGE * hat, pull)
        shared, own = _clipped(self.noise)
        meat = own * np.eye(lengths) + shared
        each = (pull * (meat @ loose)).sum(axis=(2, 3))
        out: Array = (weight * each).sum(axis=1)
        return np.where(np.isfinite(out) & (out > 0), out, np.inf)


def sensitivity(
    prior: Prior,
    sizes: Mapping[str, Sequence[float]],
    inputs: Mapping[str, Array],
    truth: Sequence[SizeRatio],
    reference: str,
) -> Sensitivity:
    """From the candidate sizes of each architecture and the law's data input at each iteration count (lengths)."""
    names = sorted(sizes)
    law = prior.law
    width = len(law.names)
    shared = [law.names.index(name) for name in law.shared]
    logs = {
        name: np.array([[[np.log(n), np.log(d)] for d in inputs[name]] for n in sizes[name]])
        for name in names
    }
    centre = np.concatenate([cells.reshape(-1, 2) for cells in logs.values()]).mean(axis=0)
    u = {name: law.to_solver(prior.row(name), centre) for name in names}

    def spread(values: Array, part: int) -> Array:
        """Derivatives by an architecture's own parameters among those of all."""
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
            row.architecture: np.log([row.n_params, inputs[row.architecture].max()]) - centre,
            reference: np.log([row.reference_n_params, inputs[reference].max()]) - centre,
        }
        gradient = {name: law.predict_with_jacobian(u[name], z[None])[1][0, 0] for name, z in at.items()}
        z = at[row.architecture]
        aside = np.array([STEP, 0.0])
        ends = law.predict(u[row.architecture], np.stack([z + aside, z - aside]))[0]
        fall = (ends[0] - ends[1]) / (2 * STEP)
        targets.append(
            (
                spread(gradient[row.architecture], names.index(row.architecture))
                - spread(gradient[reference], names.index(reference))
            )
            / fall
        )
    return Sensitivity(*_used(np.concatenate(slopes), np.array(targets)), np.array(size), prior.noise)


def _used(slopes: Array, targets: Array) -> tuple[Array, Array]:
    """Without the places of parameters that are shared and so counted once."""
    used = np.abs(slopes).max(axis=(0, 1)) > 0
    return slopes[:, :, used], targets[:, used]


def _clipped(noise: Noise) -> tuple[float, float]:
    """Covariance within a series and the rest of a run's variance, of least absolute deviations."""
    total = noise.total**2 * np.pi / 2  # so many times the variance of least squares
    shared = total * 2 / np.pi * float(np.arcsin(noise.series**2 / max(noise.total**2, 1e-300)))
    return shared, total - shared
