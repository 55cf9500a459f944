"""IsoFLOP campaigns with known answers, from numpy alone: missed budgets, sizes off centre, other FLOPs, noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Array = NDArray[np.float64]
Rate = Callable[[Array], Array]

TRANSFORMER = {"E": 2.30, "A": 420.0, "B": 1900.0, "alpha": 0.36, "beta": 0.37}
SSM = {"E": 2.28, "A": 300.0, "B": 1700.0, "alpha": 0.355, "beta": 0.37}
EVERY = np.exp(np.linspace(np.log(1e4), np.log(1e13), 8_001))
"""Sizes among which the best is looked up."""


def plain(n: Array) -> Array:
    """Return 6 FLOPs a parameter and token."""
    return 6 * n


def attention(n: Array) -> Array:
    """Return the FLOPs of attention over 1024 positions as well: 6 % more at 3M parameters, 1 % at 100M."""
    return 6 * n + 12 * 24 * 1024 * np.sqrt(n / 1e8)


@dataclass(frozen=True)
class Campaign:
    """Sizes at `around` times the best one of each budget; budgets miss by up to `off`, losses scatter by `noise`."""

    laws: dict[str, dict[str, float]] = field(
        default_factory=lambda: {"cross_transformer": TRANSFORMER, "ssm": SSM}
    )
    budgets: tuple[float, ...] = (1e18, 3e18, 1e19, 3e19, 1e20)
    around: tuple[float, ...] = (*np.geomspace(0.25, 4, 9).tolist(), 1.02)
    off: float = 0.1
    noise: float = 0.0015
    rate: Rate = attention
    gamma: float = 1.0
    """1 for the additive law; E + (size^(1/gamma) + data^(1/gamma))^gamma."""

    def loss(self, arm: str, n: Array, d: Array) -> Array:
        """Return the loss in nats without noise."""
        law = self.laws[arm]
        by_size, by_data = law["A"] / n ** law["alpha"], law["B"] / d ** law["beta"]
        out: Array = law["E"] + (by_size ** (1 / self.gamma) + by_data ** (1 / self.gamma)) ** self.gamma
        return out

    def at_budget(self, arm: str, flops: float) -> tuple[float, float]:
        """Return the best size for a budget, and its loss, by trying every size."""
        loss = self.loss(arm, EVERY, flops / self.rate(EVERY))
        lowest = int(np.argmin(loss))
        return float(EVERY[lowest]), float(loss[lowest])

    def exponent(self, arm: str) -> float:
        """Return the slope of the best size in compute over the budgets."""
        sizes = [self.at_budget(arm, flops)[0] for flops in self.budgets]
        return float(np.polyfit(np.log(self.budgets), np.log(sizes), 1)[0])

    def gain(self, arm: str, reference: str, flops: float) -> float:
        """Return C / C' at equal loss along the frontiers, by bisection."""
        _, target = self.at_budget(reference, flops)
        low, high = flops / 1e4, flops * 1e4
        for _ in range(60):
            middle = np.sqrt(low * high)
            low, high = (middle, high) if self.at_budget(arm, middle)[1] > target else (low, middle)
        return flops / float(np.sqrt(low * high))

    def table(self, seed: int) -> pd.DataFrame:
        """Return the runs as a raw table, each a training run of its own."""
        rng = np.random.default_rng(seed)
        rows = []
        for arm in self.laws:
            for budget in self.budgets:
                best, _ = self.at_budget(arm, budget)
                n = best * np.array(self.around)
                flops = budget * rng.uniform(1 - self.off, 1 + self.off, len(n))
                tokens = flops / self.rate(n)
                loss = self.loss(arm, n, tokens) * np.exp(rng.normal(0, self.noise, len(n)))
                rows.append(
                    pd.DataFrame(
                        {"architecture": arm, "n_params": n, "tokens": tokens, "flops": flops, "loss": loss}
                    )
                )
        table = pd.concat(rows, ignore_index=True)
        return table.assign(run_id=[f"run-{number}" for number in range(len(table))])
