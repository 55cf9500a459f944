"""What one architecture saves against another at equal loss: size ratio and compute gain, with paired intervals.

At each iteration count (else number of tokens) and reference size N_ref, N' solves L_arch(N', D) = L_ref(N_ref, D); the
ratio is N_ref / N'. Intervals come from resamples drawn alike for both architectures, since two overlapping
intervals say nothing about a difference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from analysis.laws.law import Array, Law

if TYPE_CHECKING:
    import pandas as pd

Verdict = Literal["identified", "extrapolated", "not_identified"]

DEFAULT_REFERENCE = "cross_transformer"
# A law is solved for its size between one parameter and far beyond anything trained.
SMALLEST, LARGEST = 0.0, float(np.log(1e18))
# Relative fall in loss over the trained sizes below which a law says nothing of size.
FLATTEST = 1e-4
SAME_BUDGET = 1.01  # budgets that differ by no more than this factor count as one
MANY_BUDGETS = 12
MANY_SIZES = 8


@dataclass(frozen=True)
class Curve:
    """A fitted law in its own units, at the estimate (first row) and at every resample: (1 + resamples, parameters).

    A law of repeated data is read at the most unique tokens its architecture was trained on.
    """

    law: Law
    params: Array
    frame: pd.DataFrame
    obstacle: str = ""  # why no size can be read off this law, where that is so

    def loss(self, n_params: Array | float, data: Array | float) -> Array:
        """Loss in nats (1 + resamples) at sizes and budgets that are one number or one a resample."""
        columns = {"n_params": n_params, "tokens": data, "iterations": data}
        if "unique_tokens" in self.law.inputs:
            columns["unique_tokens"] = float(self.frame["unique_tokens"].max())
        logs = [np.log(np.broadcast_to(columns[name], len(self.params))) for name in self.law.inputs]
        out: Array = self.law.predict(self.params, np.stack(logs, axis=1)[:, None, :])[:, 0]
        return out

    def losses_at(self, params: Array, n_params: Array, data: Array) -> Array:
        """Loss in nats (problems, points) by params (problems, parameters) at sizes and budgets (points)."""
        columns = {"n_params": n_params, "tokens": data, "iterations": data}
        if "unique_tokens" in self.law.inputs:
            columns["unique_tokens"] = np.full(len(data), float(self.frame["unique_tokens"].max()))
        z = np.log(np.stack([columns[name] for name in self.law.inputs], axis=1))
        return self.law.predict(params, z)

    def loss_of_points(self) -> Array:
        """The estimate's loss in nats at every point of the frame (points)."""
        z = np.log(self.frame[list(self.law.inputs)].to_numpy(dtype=np.float64))
        out: Array = self.law.predict(self.params[:1], z)[0]
        return out

    def budget(self, iterations: float | None, tokens: float) -> float:
        """The data input of this law at that iteration count: its own tokens there, or the iterations themselves."""
        if iterations is None:
            return tokens
        return iterations if "iterations" in self.law.inputs else self.tokens(iterations)

    def tokens(self, iterations: float) -> float:
        """Tokens this architecture sees in so many iterations."""
        there = self.frame.loc[self.frame["iterations"] == iterations, "tokens"]
        rate = self.frame["tokens"] / self.frame["iterations"]
        return float(there.median()) if len(there) else float(rate.median()) * iterations

    @property
    def budgets(self) -> tuple[float, float]:
        """The shortest and the longest trained budget, in what the law counts data in; without end where in nothing."""
        counted = [name for name in ("tokens", "iterations") if name in self.law.inputs]
        if not counted:
            return 0.0, float("inf")
        return float(self.frame[counted[0]].min()), float(self.frame[counted[0]].max())

    @property
    def sizes(self) -> Array:
        """Trained sizes in ascending order."""
        return np.unique(self.frame["n_params"].to_numpy(dtype=np.float64))


UNBOUNDED = 1e15
"""Beyond any real ratio: an interval that reaches it has no end."""


def default_reference(architectures: list[str]) -> str:
    """cross_transformer where there is one, else the first name in sorted order."""
    return DEFAULT_REFERENCE if DEFAULT_REFERENCE in architectures else sorted(architectures)[0]


def size_at(curve: Curve, loss: Array, data: float) -> Array:
    """n_params (1 + resamples) that reach `loss` at that budget: inf where no size does, 0 where every size does."""
    return _reaching(lambda n_params: curve.loss(n_params, data), loss)


def data_at(curve: Curve, loss: Array, n_params: float) -> Array:
    """The data input (1 + resamples) with which that size reaches `loss`: inf where none does, 0 where all do."""
    return _reaching(lambda data: curve.loss(n_params, data), loss)


def _reaching(curve: Callable[[Array], Array], loss: Array) -> Array:
    """Bisection on the logarithm of what the loss falls with: it needs no formula of a law's own."""
    low, high = np.full(len(loss), SMALLEST), np.full(len(loss), LARGEST)
    never = ~(curve(np.exp(high)) < loss)
    always = curve(np.exp(low)) < loss
    for _ in range(36):
        middle = 0.5 * (low + high)
        reached = curve(np.exp(middle)) < loss
        low, high = np.where(reached, low, middle), np.where(reached, middle, high)
    out: Array = np.where(never, np.inf, np.where(always, 0.0, np.exp(0.5 * (low + high))))
    return out


def central(values: Array) -> tuple[float, float] | None:
    """Central 95 % of the resamples; a resample in which no size reaches the loss counts as a ratio of 0."""
    drawn = values[1:]
    if len(drawn) < 2:
        return None
    low, high = np.percentile(np.nan_to_num(drawn, nan=0.0, posinf=1e300), [2.5, 97.5], method="nearest")
    return float(low), float(high)


def open_end(interval: tuple[float, float] | None, always: str) -> str:
    """Why an interval of ratios has no end, or nothing; `always` says of what a law may be below a loss regardless."""
    if interval is None or 0 < interval[0] <= interval[1] < UNBOUNDED:
        return ""
    ends = []
    if interval[0] <= 0:
        ends.append("never reach the loss")
    if interval[1] >= UNBOUNDED:
        ends.append(f"are below the loss {always}")
    return f"its 95 % interval has no end: too many resamples {' or '.join(ends)}"


def budgets_of(base: Curve, curves: Mapping[str, Curve]) -> list[tuple[float | None, float]]:
    """Iteration counts with the reference's tokens there, else token counts (a handful where there are many).

    They are iterations only where every one of the curves has them: no other could be read at a count of them.
    """
    frame = base.frame
    if all(curve.frame["iterations"].notna().all() for curve in curves.values()):
        counts = np.unique(frame["iterations"].to_numpy(dtype=np.float64))
        if len(counts) > MANY_BUDGETS:
            counts = counts[np.linspace(0, len(counts) - 1, MANY_BUDGETS).round().astype(int)]
        return [
            (float(count), float(frame.loc[frame["iterations"] == count, "tokens"].median()))
            for count in counts
        ]
    tokens = np.unique(frame["tokens"].to_numpy(dtype=np.float64))
    if len(tokens) > MANY_BUDGETS:
        tokens = np.geomspace(tokens[0], tokens[-1], 6)
    return [(None, float(value)) for value in tokens]
