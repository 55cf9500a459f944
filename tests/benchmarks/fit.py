"""The fit of E + A/N^alpha + B/D^beta, against L-BFGS-B from a grid of starts.

The baseline is approach 3 of Hoffmann et al. 2022 (arXiv 2203.15556, section D.2): 4500 starts, logarithms of the
coefficients, the loss as a log-sum-exp. Its gradient is analytic and the points are one array.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import minimize

from analysis.fitting.solver import FitResult, Problem, fit_law, huber
from analysis.laws.catalogue import CHINCHILLA
from analysis.laws.law import Array
from tests.benchmarks.measure import Row, Seconds, clocked, times

DELTA = 1e-3
TRUE = {"E": 1.9, "A": 400.0, "B": 1500.0, "alpha": 0.34, "beta": 0.37}
EXPONENTS = np.arange(0.0, 2.1, 0.5)
LOG_E = np.arange(-1.0, 1.1, 0.5)
LOG_COEFFICIENTS = np.arange(0.0, 26.0, 5.0)
SAMPLE = 20  # starts a round where all would take too long
BLIND_SAMPLE = 5
PATIENCE_SECONDS = 60.0
SAME = 1e-9  # relative difference of objectives that are called the same


def run(*, quick: bool) -> Iterator[Row]:
    """Yield the time of one fit against all starts and against as many as are needed, and both objectives."""
    rounds = 3 if quick else 9
    x, loss = synthetic_points()
    grid = GridSearch(np.log(x), np.log(loss))
    problem = Problem.of(CHINCHILLA, x, loss, DELTA)
    result = fit_law(problem)
    count = len(grid.starts)
    first = clocked(lambda: grid.search(SAMPLE)) / SAMPLE
    whole = not quick and first * count < PATIENCE_SECONDS
    part = math.ceil(count / rounds) if whole else SAMPLE

    ours, per_start = _by_turns(problem, grid, rounds, part)
    tried, best = len(grid.ends), min(grid.ends)
    timed = "" if tried >= count else f" ({tried} tried)"
    yield times(f"fit: {len(loss)} points, {count} starts{timed}", ours, per_start * count)
    blind = GridSearch(np.log(x), np.log(loss), analytic=False)
    without = np.array([clocked(lambda: blind.search(BLIND_SAMPLE)) / BLIND_SAMPLE for _ in range(rounds)])
    tried_blind = f"({len(blind.ends)} tried)"
    yield times(f"fit: the same by finite differences {tried_blind}", ours, without * count)

    reached = sum(end <= best * (1 + SAME) for end in grid.ends) / tried
    needed = math.ceil(math.log(0.05) / math.log(1 - reached)) if reached < 1 else 1
    enough = f"fit: {needed} starts, enough 19 times in 20 ({reached:.0%} end at the best)"
    yield times(enough, ours, per_start * needed)
    yield times("fit: one start", ours, per_start)
    yield _objectives(result, best)


def synthetic_points() -> tuple[Array, Array]:
    """Return N and D (240, 2) on a grid of sizes and budgets, and losses with half a per cent of noise."""
    sizes, budgets = np.meshgrid(np.geomspace(1e7, 1e10, 20), np.geomspace(2e8, 2e11, 12))
    x = np.column_stack([sizes.ravel(), budgets.ravel()])
    clean = TRUE["E"] + TRUE["A"] / x[:, 0] ** TRUE["alpha"] + TRUE["B"] / x[:, 1] ** TRUE["beta"]
    return x, clean * np.exp(np.random.default_rng(0).normal(0, 0.005, len(x)))


@dataclass(frozen=True)
class LogSumExp:
    """The objective in (log A, log B, log E, alpha, beta) over points log_x (points, 2), y (points)."""

    log_x: Array
    y: Array
    weights: Array

    def __call__(self, theta: Array) -> tuple[float, Array]:
        """Return the sum of weighted Huber losses and its gradient."""
        exponents = theta[3:]
        terms = np.column_stack([theta[:2] - exponents * self.log_x, np.full(len(self.y), theta[2])])
        highest = terms.max(axis=1)
        shares = np.exp(terms - highest[:, None])
        total = shares.sum(axis=1)
        residual = highest + np.log(total) - self.y
        pull = shares * (self.weights * np.clip(residual, -DELTA, DELTA) / total)[:, None]
        gradient = np.concatenate([pull.sum(axis=0), -(pull[:, :2] * self.log_x).sum(axis=0)])
        return float((self.weights * huber(residual, DELTA)).sum()), gradient

    def value(self, theta: Array) -> float:
        """Return the sum alone."""
        terms = np.column_stack([theta[:2] - theta[3:] * self.log_x, np.full(len(self.y), theta[2])])
        highest = terms.max(axis=1)
        residual = highest + np.log(np.exp(terms - highest[:, None]).sum(axis=1)) - self.y
        return float((self.weights * huber(residual, DELTA)).sum())


@dataclass
class GridSearch:
    """L-BFGS-B from each start in turn, in a fixed random order; `ends` holds the objectives reached."""

    log_x: Array
    y: Array
    analytic: bool = True
    ends: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        axes = (LOG_COEFFICIENTS, LOG_COEFFICIENTS, LOG_E, EXPONENTS, EXPONENTS)
        self.starts = np.random.default_rng(1).permutation(np.array(list(itertools.product(*axes))))
        self.objective = LogSumExp(self.log_x, self.y, np.ones(len(self.y)))

    def search(self, count: int) -> None:
        """Descend from the next `count` starts."""
        done = len(self.ends)
        work = self.objective if self.analytic else self.objective.value
        for start in self.starts[done : done + count]:
            # scipy's default tolerance suits objectives of order one; this one is of order 1e-3.
            options = {"maxiter": 2000, "maxfun": 10000, "ftol": 1e-13, "gtol": 1e-9}
            found = minimize(work, start, jac=self.analytic, method="L-BFGS-B", options=options)
            self.ends.append(float(found.fun))


def _by_turns(problem: Problem, grid: GridSearch, rounds: int, part: int) -> tuple[Seconds, Seconds]:
    """Return the seconds of our fit and of one start of theirs, by round."""
    ours, per_start = [], []
    for _ in range(rounds):
        ours.append(clocked(lambda: fit_law(problem)))
        before = len(grid.ends)
        seconds = clocked(lambda: grid.search(part))
        per_start.append(seconds / (len(grid.ends) - before))
    return np.array(ours), np.array(per_start)


def _objectives(result: FitResult, best: float) -> Row:
    difference = (result.objective - best) / best
    if abs(difference) > SAME:
        raise AssertionError(f"the sides end apart: ours at {result.objective!r}, theirs at {best!r}")
    return Row(
        "fit: objective",
        f"{result.objective:.9f}",
        f"{best:.9f}",
        f"ours {'higher' if difference > 0 else 'lower'} by {abs(difference):.1e} of it",
    )
