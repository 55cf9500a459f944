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


def budget_column(frame: pd.DataFrame) -> str:
    """`iterations` where every row has them, else `tokens`."""
    return "iterations" if bool(frame["iterations"].notna().all()) else "tokens"


def seed_noise(frame: pd.DataFrame) -> list[SeedNoise]:
    """Configurations of one architecture that were trained under two seeds or more."""
    budget = budget_column(frame)
    cells: dict[tuple[float, float], dict[str, list[float]]] = {}
    for n_params, count, cluster, loss in zip(
        frame["n_params"], frame[budget], frame["cluster"], frame["loss"], strict=True
    ):
        cells.setdefault((float(n_params), float(count)), {}).setdefault(str(cluster), []).append(float(loss))
    out = []
    for (n_params, count), series in sorted(cells.items()):
        if len(series) >= 2:
            losses = [float(np.mean(values)) for values in series.values()]
            sd = float(np.std(losses, ddof=1))
            out.append(SeedNoise(n_params, count, len(losses), float(np.mean(losses)), sd))
    return out


def pooled_sd(noise: list[SeedNoise]) -> float | None:
    """Standard deviation between seeds over all configurations, weighted by their degrees of freedom."""
    freedom = sum(item.seeds - 1 for item in noise)
    return float(np.sqrt(sum((item.seeds - 1) * item.sd**2 for item in noise) / freedom)) if freedom else None


def trend_checks(architecture: str, frame: pd.DataFrame) -> list[TrendCheck]:
    """Both checks for one architecture; seeds of one configuration are averaged first."""
    budget = budget_column(frame)
    unit = budget
    sd = pooled_sd(seed_noise(frame))
    cells = frame.groupby(["n_params", budget])["loss"].mean()
    checks = []
    longest = float(frame[budget].max())
    sizes = sorted(float(value) for value in frame.loc[frame[budget] == longest, "n_params"].unique())
    if len(sizes) >= 2:
        claim = f"at {longest:,.0f} {unit} the largest model beats the smallest"
        checks.append(
            _check(
                architecture,
                "size",
                claim,
                float(cells[(sizes[0], longest)]),
                float(cells[(sizes[-1], longest)]),
                sd,
            )
        )
    largest = float(frame["n_params"].max())
    budgets = sorted(float(value) for value in frame.loc[frame["n_params"] == largest, budget].unique())
    if len(budgets) >= 2:
        claim = f"at the largest size {budgets[-1]:,.0f} {unit} beat {budgets[0]:,.0f}"
        checks.append(
            _check(
                architecture,
                "budget",
                claim,
                float(cells[(largest, budgets[0])]),
                float(cells[(largest, budgets[-1])]),
                sd,
            )
        )
    return checks


def _check(
    architecture: str,
    kind: Literal["size", "budget"],
    claim: str,
    worse: float,
    better: float,
    sd: float | None,
) -> TrendCheck:
    difference = worse - better
    ratio = None if sd is None or sd == 0 else difference / sd
    return TrendCheck(
        architecture=architecture,
        kind=kind,
        claim=claim,
        worse_loss=worse,
        better_loss=better,
        difference=difference,
        seed_sd=sd,
        ratio=ratio,
        passed=None if sd is None else difference > NEEDED * sd,
    )
