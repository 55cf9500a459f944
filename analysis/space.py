"""What a grid may be made of and what it costs, and one grid of it: its points without losses, and its spelling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.law import Array
from analysis.points import CheckedPoints
from analysis.simulate import grid_of

COLUMNS = ("architecture", "n_params", "tokens", "iterations", "seed", "cluster", "run_id")
MOST_SEEDS = 12


@dataclass(frozen=True)
class Rung:
    """A size of one architecture as it could be trained."""

    architecture: str
    size: str
    n_params: float
    tokens_an_iteration: float


@dataclass(frozen=True)
class Space:
    """What a grid may be made of, and what it costs.

    Every architecture has every size, named alike, in ascending order. `hours(architecture, size, counts, seed)` are
    the GPU-hours of one series that is trained to each of these iteration counts, less what has been trained.
    """

    rungs: tuple[Rung, ...]
    counts: tuple[int, ...]
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

    def cost_of_seeds(self, counts: Sequence[int]) -> Array:
        """GPU-hours (sizes, MOST_SEEDS) of each seed of a size, all architectures together."""
        return np.array(
            [
                [
                    sum(self.hours(name, size, counts, seed) for name in self.architectures)
                    for seed in range(MOST_SEEDS)
                ]
                for size in self.sizes
            ]
        )


@dataclass(frozen=True)
class Grid:
    """Iteration counts, and for each size of a space how many seeds it is trained with."""

    counts: tuple[int, ...]
    seeds: tuple[int, ...]

    def gpu_hours(self, space: Space) -> float:
        """What it costs."""
        return float(self.gpu_hours_of_sizes(space).sum())

    def gpu_hours_of_sizes(self, space: Space) -> Array:
        """What each size of the space costs (sizes)."""
        return spent(space.cost_of_seeds(self.counts), np.array(self.seeds))

    def points(self, space: Space) -> CheckedPoints:
        """The points it would give, before they have losses."""
        seeds = dict(zip(space.sizes, self.seeds, strict=True))
        rows: list[Sequence[object]] = []
        for rung in space.rungs:
            for seed in range(seeds[rung.size]):
                series = f"{rung.architecture}-{rung.size}-{seed}"
                for count in self.counts:
                    run = f"{series}-{count}"
                    tokens = count * rung.tokens_an_iteration
                    cluster = series if space.shares_trunk else run
                    rows.append((rung.architecture, rung.n_params, tokens, count, seed, cluster, run))
        return grid_of(COLUMNS, list(enumerate(rows, start=1)), "proposed")


def spent(cost: Array, seeds: Array) -> Array:
    """GPU-hours (sizes) of the first so many seeds of each size, by the cost of each (sizes, MOST_SEEDS)."""
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
        "iterations": list(grid.counts),
        "seeds": list(range(fewest)),
        "replicates": [
            {"sizes": sizes, "seeds": list(range(fewest, number))} for number, sizes in sorted(more.items())
        ],
    }
