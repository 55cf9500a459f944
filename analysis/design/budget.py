"""Search for the grid that gives the size ratio the narrowest interval for a budget of GPU-hours.

The search compares grids of the study's sizes and of iteration counts within its range by their closed-form variance,
then simulates the best few, since the interval of the report counts and not a variance. The runs of a series share the
cost of their trunk, so that a further iteration count costs only its decay.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from analysis.design.expect import ratios_of
from analysis.design.grid import MAX_SEEDS, Grid, Sensitivity, Space, sensitivity, spent
from analysis.design.prior import Prior
from analysis.design.simulate import Draws, Progress, Simulated, simulate, true_size_ratios
from analysis.errors import InputError
from analysis.findings.curve import reference_of
from analysis.findings.equal_loss import SizeRatio
from analysis.laws.law import Array

FEWEST = 3
"""Least number of sizes, and of iteration counts, for a law of both."""
MAX_LENGTHS = 5
FINALISTS = 5
TRIALS = Draws(studies=30)
# Least cost of a seed, as a share of the budget: gains are divided by costs, and trained runs are free.
NEARLY_FREE = 1e-9
UNLIKE = 0.2  # share of its seeds by which a finalist differs from every other


@dataclass(frozen=True)
class Proposal:
    """The best grid found, its cost, and the simulated width of the interval of the ratio's logarithm."""

    grid: Grid
    gpu_hours: float
    width: float


def propose(
    space: Space,
    prior: Prior,
    budget: float,
    reference: str | None = None,
    draws: Draws = TRIALS,
    *,
    progress: Progress | None = None,
) -> Proposal:
    """Return the best grid for `budget` GPU-hours that keeps the largest size and the longest run.

    Runs that have been trained are free. Raises InputError for a budget that is not above 0 or too small for any grid
    that a law can be fitted to, and for a study with too few sizes or architectures for a size ratio.
    """
    if not 0 < budget < float("inf"):
        raise InputError(f"--budget {budget:g}: must be above 0, in GPU-hours.")
    if len(space.architectures) < 2:
        raise InputError(
            f"--budget: a size ratio needs two architectures; the grid has {space.architectures[0]}."
        )
    if len(space.sizes) < FEWEST or len(space.iterations) < FEWEST:
        raise InputError(
            f"--budget: a grid is chosen from {FEWEST} sizes and iteration counts or more; the study has "
            f"{len(space.sizes)} sizes and {len(space.iterations)} iteration counts."
        )
    base = reference_of(space.architectures, reference)
    costs = {iterations: space.cost_of_seeds(iterations) for iterations in _choices(space)}
    least = min(_cheapest(cost) for cost in costs.values())
    if budget < least:
        raise InputError(
            f"--budget {budget:g}: is too small for a grid with the largest size and the longest run; the least grid "
            f"for a law takes {least:.4g} GPU-hours."
        )
    truth = _truth(space, prior, base)
    ranked: list[tuple[float, Grid]] = []
    for iterations, cost in costs.items():
        if _cheapest(cost) <= budget:
            screen = sensitivity(space, iterations, prior, truth, base)
            ranked += _best_seeds(screen, cost, iterations, budget)
    finalists = _unlike([grid for _, grid in sorted(ranked, key=lambda found: found[0])])
    proposals = []
    for number, grid in enumerate(finalists, start=1):
        width = _worth(simulate(grid.points(space), prior, base, draws), base)
        proposals.append(Proposal(grid, grid.gpu_hours(space), width))
        if progress is not None:
            progress(number, len(finalists))
    return min(proposals, key=lambda one: one.width)


def _unlike(ranked: Sequence[Grid]) -> list[Grid]:
    """Return the first few grids with different seeds; among similar grids the variance chooses well enough."""
    chosen: list[Grid] = []
    for grid in ranked:
        seeds = np.array(grid.seeds)
        if all(np.abs(seeds - other.seeds).sum() > UNLIKE * seeds.sum() for other in chosen):
            chosen.append(grid)
        if len(chosen) == FINALISTS:
            break
    return chosen


def _worth(found: Simulated, reference: str) -> float:
    """Return the mean width of the expected intervals or, if wider, of those that the scatter of estimates implies.

    Grids that depend on one series have narrow intervals that miss the truth; those are no gain.
    """
    widths = []
    for row in ratios_of(found, reference):
        ratios = [one.estimate for one in found.found[row.architecture] if one.estimate]
        off = np.log(np.array(ratios) / (row.truth or 1.0))
        scatter = 2 * 1.96 * float(np.sqrt(np.mean(off**2))) if ratios else float("inf")
        widths.append(max(row.width, scatter))
    return float(np.mean(widths))


def _choices(space: Space) -> Iterator[tuple[int, ...]]:
    """Yield the sets of iteration counts that contain the longest."""
    *shorter, longest = space.iterations
    for number in range(FEWEST - 1, min(MAX_LENGTHS, len(space.iterations))):
        for chosen in combinations(shorter, number):
            yield (*chosen, longest)


def _cheapest(cost: Array) -> float:
    """Return the GPU-hours of the largest size and the two cheapest others, one seed each."""
    first = cost[:, 0]
    return float(first[-1] + np.sort(first[:-1])[: FEWEST - 1].sum())


def _truth(space: Space, prior: Prior, reference: str) -> list[SizeRatio]:
    whole = Grid(space.iterations, (1,) * len(space.sizes)).points(space)
    truth = true_size_ratios(whole, prior, reference)
    if all(row.n_params is None for row in truth):
        raise InputError(f"--budget: the prior gives no size ratio to plan for: {truth[0].reason}.")
    return truth


def _best_seeds(
    screen: Sensitivity, cost: Array, iterations: tuple[int, ...], budget: float
) -> list[tuple[float, Grid]]:
    """Choose seeds by greedy steps from each three sizes with the smallest and the largest, then by exchanges."""
    found: dict[tuple[int, ...], float] = {}
    for middle in range(1, len(cost) - 1):
        start = np.zeros(len(cost))
        start[[0, middle, -1]] = 1
        if spent(cost, start).sum() > budget:
            continue
        seeds, value = _filled(screen, cost, budget, start)
        improved = True
        while improved:
            improved = False
            for out in np.flatnonzero(seeds > 0):
                less = seeds.copy()
                less[out] -= 1
                if less[-1] < 1 or (less > 0).sum() < FEWEST:
                    continue
                other, reached = _filled(screen, cost, budget, less, without=int(out))
                if reached < value * (1 - 1e-9):
                    seeds, value, improved = other, reached, True
                    break
        found[tuple(int(number) for number in seeds)] = value
    return [(value, Grid(iterations, seeds)) for seeds, value in found.items()]


def _filled(
    screen: Sensitivity, cost: Array, budget: float, seeds: Array, without: int | None = None
) -> tuple[Array, float]:
    """Add the seed that gains most for its cost until the budget is spent; the first is not of size `without`."""
    value = float(_widened(screen, seeds[None])[0])
    while True:
        left = budget - float(spent(cost, seeds).sum())
        able = [
            j
            for j in range(len(cost))
            if seeds[j] < MAX_SEEDS and cost[j, int(seeds[j])] <= left * (1 + 1e-9) and j != without
        ]
        without = None
        if not able:
            return seeds, value
        tried = np.repeat(seeds[None], len(able), axis=0)
        tried[range(len(able)), able] += 1
        reached = _widened(screen, tried)
        price = np.maximum(cost[able, seeds[able].astype(int)], NEARLY_FREE * budget)
        gain = (np.log(value) - np.log(reached)) / price if np.isfinite(value) else -np.log(reached)
        chosen = int(np.argmax(gain))
        if not reached[chosen] < value:
            return seeds, value
        seeds, value = tried[chosen], float(reached[chosen])


def _widened(screen: Sensitivity, seeds: Array) -> Array:
    """Return the variance times the square of Student's quantile: few series do not measure their scatter well."""
    from scipy.special import stdtrit

    out: Array = screen.variance(seeds) * stdtrit(np.maximum(2, seeds.sum(axis=1) - 3), 0.975) ** 2
    return out
