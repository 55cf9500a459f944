"""Two checks of the losses themselves, before any fit: does loss fall with size and with training?

At the longest budget the largest model must beat the smallest, and at the largest size the longest budget must beat the
shortest, each by more than twice the standard deviation between seeds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

Kind = Literal["size", "budget"]

NEEDED = 2.0  # seed standard deviations
MOST_DEVIATION = 3.0  # medians


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
    """A difference in mean loss (nats, positive if the loss falls as it should) against the noise between seeds.

    `ratio` and `passed` are None if no configuration was trained under several seeds.
    """

    architecture: str
    kind: Kind
    claim: str
    worse_loss: float
    better_loss: float
    difference: float
    seed_sd: float | None
    ratio: float | None
    passed: bool | None


def data_column(frame: pd.DataFrame) -> Literal["iterations", "tokens"]:
    """Return `iterations` if every row has them, else `tokens`."""
    return "iterations" if bool(frame["iterations"].notna().all()) else "tokens"


def seed_noise(frame: pd.DataFrame) -> list[SeedNoise]:
    """Return the configurations of one architecture that were trained under two or more seeds."""
    series = frame.groupby(["n_params", data_column(frame), "cluster"], sort=False)["loss"].mean()
    keys = [series.index.get_level_values(level).to_numpy(dtype=np.float64) for level in (0, 1)]
    order = np.lexsort(keys[::-1])
    sizes, data = (values[order] for values in keys)
    starts = np.flatnonzero((np.diff(sizes) != 0) | (np.diff(data) != 0)) + 1
    out = []
    for losses, first in zip(np.split(series.to_numpy()[order], starts), [0, *starts], strict=True):
        if len(losses) >= 2:
            sd = float(np.std(losses, ddof=1))
            out.append(
                SeedNoise(float(sizes[first]), float(data[first]), len(losses), float(np.mean(losses)), sd)
            )
    return out


def pooled_sd(noise: list[SeedNoise]) -> float | None:
    """Return the standard deviation between seeds, pooled over configurations; None if there are none.

    A configuration counts with at most three times the median deviation: one of its runs may have diverged.
    """
    freedom = sum(item.seeds - 1 for item in noise)
    if not freedom:
        return None
    most = MOST_DEVIATION * float(np.median([item.sd for item in noise]))
    return float(np.sqrt(sum((item.seeds - 1) * min(item.sd, most) ** 2 for item in noise) / freedom))


def trend_checks(architecture: str, frame: pd.DataFrame) -> list[TrendCheck]:
    """Make both checks for one architecture on losses averaged over seeds; skip one that has a single value."""
    column = data_column(frame)
    sd = pooled_sd(seed_noise(frame))
    means = frame.groupby(["n_params", column])["loss"].mean()
    by_size = means.xs(frame[column].max(), level=1)
    by_data = means.xs(frame["n_params"].max(), level=0)
    longest, shortest = f"{by_data.index[-1]:,.0f}", f"{by_data.index[0]:,.0f}"
    sides: tuple[tuple[Kind, str, pd.Series[float]], ...] = (
        ("size", f"at {frame[column].max():,.0f} {column} the largest model beats the smallest", by_size),
        ("budget", f"at the largest size {longest} {column} beat {shortest}", by_data),
    )
    checks = []
    for kind, claim, losses in sides:
        if len(losses) >= 2:
            worse, better = float(losses.iloc[0]), float(losses.iloc[-1])
            difference = worse - better
            ratio = difference / sd if sd else None
            passed = None if sd is None else difference > NEEDED * sd
            check = TrendCheck(architecture, kind, claim, worse, better, difference, sd, ratio, passed)
            checks.append(check)
    return checks
