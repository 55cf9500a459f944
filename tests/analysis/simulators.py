"""Simulated campaigns with known answers, written without the fitting code, so that faults show.

Losses follow a law of size N and tokens D, times exp(noise of the series + noise of the row). A `Campaign` makes its
tables, and finds its own size ratios, losses and optima by bisection and by search on a grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd

REFERENCE, ARM = "transformer", "ssm"


@dataclass(frozen=True)
class Truth:
    """E + ((A/N^alpha)^(1/gamma) + (B/D^beta)^(1/gamma))^gamma; gamma 1 is the additive law."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    gamma: float = 1.0

    def loss(self, n_params: float, tokens: float) -> float:
        """Return the loss in nats."""
        of_size, of_data = self.A / n_params**self.alpha, self.B / tokens**self.beta
        joined: float = (of_size ** (1 / self.gamma) + of_data ** (1 / self.gamma)) ** self.gamma
        return self.E + joined


TRANSFORMER = Truth(2.30, 420.0, 1900.0, 0.36, 0.37)
SSM = Truth(2.28, 300.0, 1700.0, 0.355, 0.37)
SIZES = tuple(np.geomspace(3e7, 1e9, 7).tolist())
TOKENS = tuple(np.geomspace(5e8, 1.6e10, 6).tolist())


@dataclass(frozen=True)
class Campaign:
    """A grid of sizes and tokens for each architecture; the rows of one size and seed are one series."""

    laws: Mapping[str, Truth] = field(default_factory=lambda: {REFERENCE: TRANSFORMER, ARM: SSM})
    sizes: Mapping[str, Sequence[float]] = field(default_factory=lambda: {REFERENCE: SIZES, ARM: SIZES})
    tokens: Mapping[str, Sequence[float]] = field(default_factory=lambda: {REFERENCE: TOKENS, ARM: TOKENS})
    seeds: int = 1
    series_noise: float = 0.002
    row_noise: float = 0.002
    outliers: float = 0.0
    """Share of the rows that diverged, to between 1.2 and 3.5 times their loss."""
    small_noise: float = 0.0
    """Noise grows as (largest size / size) to this power."""
    budgets: Sequence[float] = ()
    """FLOPs of an IsoFLOP campaign, which takes the place of the grid."""

    def table(self, seed: int) -> pd.DataFrame:
        """Return the points of one simulated campaign."""
        rng = np.random.default_rng([20261130, seed])
        rows = [row for name in self.laws for row in self._rows(name, rng)]
        table = pd.DataFrame(rows)
        if self.outliers:
            off = rng.random(len(table)) < self.outliers
            table.loc[off, "loss"] *= rng.uniform(1.2, 3.5, int(off.sum()))
        return table

    def _rows(self, name: str, rng: np.random.Generator) -> list[dict[str, object]]:
        cells = self._isoflop(name, rng) if self.budgets else self._grid(name)
        rows = []
        largest = max(size for size, _ in cells)
        for seed in range(self.seeds):
            for size in dict.fromkeys(size for size, _ in cells):
                grown = (largest / size) ** self.small_noise
                series = rng.normal(0.0, self.series_noise * grown)
                for _, tokens in [cell for cell in cells if cell[0] == size]:
                    noise = series + rng.normal(0.0, self.row_noise * grown)
                    rows.append(
                        {
                            "architecture": name,
                            "n_params": size,
                            "tokens": tokens,
                            "flops": 6.0 * size * tokens,
                            "loss": self.laws[name].loss(size, tokens) * np.exp(noise),
                            "run_id": f"{name}-{size:.6g}-{tokens:.6g}-{seed}",
                            "cluster": f"{name}-{size:.6g}-{seed}",
                            "seed": seed,
                        }
                    )
        return rows

    def _grid(self, name: str) -> list[tuple[float, float]]:
        return [(size, tokens) for size in self.sizes[name] for tokens in self.tokens[name]]

    def _isoflop(self, name: str, rng: np.random.Generator) -> list[tuple[float, float]]:
        cells = []
        for budget in self.budgets:
            best = self.optimal_size(name, budget)
            for size in best * np.geomspace(0.25, 4.0, 9):
                spent = budget * rng.uniform(0.92, 1.1)
                cells.append((float(size), float(spent / (6.0 * size))))
        return cells

    def ratio(self, n_ref: float, tokens: float, tokens_of_arm: float | None = None) -> float:
        """Return n_ref over the arm's size that has the reference's loss; the arm may train on other tokens."""
        wanted = self.laws[REFERENCE].loss(n_ref, tokens)
        low, high = np.log(1e2), np.log(1e15)
        for _ in range(200):
            middle = 0.5 * (low + high)
            above = self.laws[ARM].loss(float(np.exp(middle)), tokens_of_arm or tokens) > wanted
            low, high = (middle, high) if above else (low, middle)
        return n_ref / float(np.exp(low))

    def optimal_size(self, name: str, budget: float) -> float:
        """Return the size of the least loss at so many FLOPs of 6 N D."""
        sizes = np.geomspace(1e5, 1e13, 20_001)
        losses = [self.laws[name].loss(size, budget / (6.0 * size)) for size in sizes]
        return float(sizes[int(np.argmin(losses))])


def both(law: Truth) -> dict[str, Truth]:
    """Return two identical arms."""
    return {REFERENCE: law, ARM: law}


def coupled(gamma: float) -> dict[str, Truth]:
    """Return both arms under a law in which size and data act together."""
    return {REFERENCE: replace(TRANSFORMER, gamma=gamma), ARM: replace(SSM, gamma=gamma)}


CAMPAIGNS: dict[str, Campaign] = {
    "one_seed": Campaign(),
    "three_seeds": Campaign(seeds=3),
    "null": Campaign(laws=both(TRANSFORMER), seeds=3),
    "null_one_seed": Campaign(laws=both(TRANSFORMER)),
    "outliers": Campaign(seeds=3, outliers=0.04),
    "outliers_one_seed": Campaign(outliers=0.04),
    "noisy_small": Campaign(seeds=3, small_noise=0.3),
    "unequal": Campaign(
        sizes={REFERENCE: SIZES, ARM: tuple(np.geomspace(2e7, 6e8, 6).tolist())},
        tokens={REFERENCE: TOKENS, ARM: TOKENS[:-1]},
        seeds=2,
    ),
    "crossing": Campaign(
        laws={REFERENCE: TRANSFORMER, ARM: replace(SSM, E=2.33, A=160.0, alpha=0.33)}, seeds=3
    ),
    "isoflop": Campaign(budgets=(1e18, 3e18, 1e19, 3e19, 1e20)),
    "coupled": Campaign(laws=coupled(0.5), seeds=3),
    "no_size": Campaign(laws={name: replace(law, A=0.0, E=2.6) for name, law in both(TRANSFORMER).items()}),
}
"""The campaigns by which intervals and verdicts are judged."""
