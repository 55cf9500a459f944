"""Two plain checks that training did what a scaling law assumes, made on the losses themselves and not on a fit.

At the longest budget the largest model must beat the smallest, and at the largest size the longest budget must beat the
shortest, each by more than twice the standard deviation between seeds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

NEEDED = 2.0  # seed standard deviations


@dataclass(frozen=True)
class SeedNoise:
    """Losses of one configuration under several seeds: their mean and sample standard deviation in nats."""

    n_params: float
    budget: float
    seeds: int
    mean: float
    sd: float


@dataclass(frozen=True)
class TrendCheck:
    """A difference in mean loss (nats, positive where the law's direction holds) against the noise between seeds.

    `ratio` and `passed` are None where no configuration was trained under several seeds.
    """

    architecture: str
    kind: Literal["size", "budget"]
    claim: str
    worse_loss: float
    better_loss: float
    difference: float
    seed_sd: float | None
    ratio: float | None
    passed: bool | None


def data_column(frame: pd.DataFrame) -> Literal["iterations", "tokens"]:
    """Return `iterations` where every row has them, else `tokens`."""
    return "iterations" if bool(frame["iterations"].notna().all()) else "tokens"


def seed_noise(frame: pd.DataFrame) -> list[SeedNoise]:
    """Return the configurations of one architecture that were trained under two seeds or more."""
    series = frame.groupby(["n_params", data_column(frame), "cluster"], sort=False)["loss"].mean()
    out = []
    for _, own in series.groupby(level=[0, 1]):
        losses = own.to_numpy()
        if len(losses) >= 2:
            n_params, data, _ = own.index[0]
            sd = float(np.std(losses, ddof=1))
            out.append(SeedNoise(float(n_params), float(data), len(losses), float(np.mean(losses)), sd))
    return out


def pooled_sd(noise: list[SeedNoise]) -> float | None:
    """Standard deviation between seeds over all configurations, weighted by their degrees of freedom."""
    freedom = sum(item.seeds - 1 for item in noise)
    return float(np.sqrt(sum((item.seeds - 1) * item.sd**2 for item in noise) / freedom)) if freedom else None


def trend_checks(architecture: str, frame: pd.DataFrame) -> list[TrendCheck]:
    """Make both checks for one architecture; seeds of one configuration are averaged first."""
    column = data_column(frame)
    sd = pooled_sd(seed_noise(frame))
    means = frame.groupby(["n_params", column])["loss"].mean()
    checks = []
    longest, largest = frame[column].max(), frame["n_params"].max()
    by_size, by_data = means.xs(longest, level=1), means.xs(largest, level=0)
    if len(by_size) >= 2:
        claim = f"at {longest:,.0f} {column} the largest model beats the smallest"
        checks.append(_check(architecture, "size", claim, by_size, sd))
    if len(by_data) >= 2:
        claim = f"at the largest size {by_data.index[-1]:,.0f} {column} beat {by_data.index[0]:,.0f}"
        checks.append(_check(architecture, "budget", claim, by_data, sd))
    return checks


def _check(
    architecture: str, kind: Literal["size", "budget"], claim: str, means: pd.Series[float], sd: float | None
) -> TrendCheck:
    worse, better = float(means.iloc[0]), float(means.iloc[-1])
    difference = worse - better
    return TrendCheck(
        architecture=architecture,
        kind=kind,
        claim=claim,
        worse_loss=worse,
        better_loss=better,
        difference=difference,
        seed_sd=sd,
        ratio=difference / sd if sd else None,
        passed=None if sd is None else difference > NEEDED * sd,
    )
