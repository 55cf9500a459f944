"""A fitted law as a curve: its loss at any size and amount of data, and the size or data that reach a loss.

All values are arrays: the estimate, then each resample. Resamples of architectures pair, so that the interval of a
comparison is that of paired differences; two overlapping intervals say nothing about a difference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from analysis.errors import InputError
from analysis.findings.flops import LogRate, log_rate_of
from analysis.findings.support import SAME, Support
from analysis.laws.law import SIZE, Array, Interval, Law

if TYPE_CHECKING:
    import pandas as pd

Mask = NDArray[np.bool_]

DEFAULT_REFERENCE = "cross_transformer"
# Logarithms of the sizes between which a law is solved: one parameter, and far more than any model has.
SMALLEST, LARGEST = 0.0, float(np.log(1e18))
BRACKETS = 48  # intervals of a curve that are searched for a fall
MAX_RUNGS = 96
UNBOUNDED = 1e15
"""Larger than any real ratio: an interval that reaches it has no end."""


@dataclass(frozen=True)
class Rung:
    """A trained size, and its training in iterations (None if they are not compared) and tokens."""

    n_params: float
    iterations: float | None
    tokens: float


@dataclass(frozen=True)
class Curve:
    """A fitted law in its own units: `params` (1 + resamples, parameters), the estimate in the first row.

    `data` is the law's own data input: tokens or iterations. Further inputs are held at the value that each declares.
    """

    law: Law
    params: Array
    frame: pd.DataFrame
    unidentified_because: str = ""  # reason why this law identifies no size, if there is one
    rejected_because: str = (
        ""  # reason why the residuals reject this law, if they do: its numbers are shown, no more
    )

    def loss(self, n_params: Array | float, data: Array | float) -> Array:
        """Return the loss in nats (1 + resamples); size and data are one number or one for each resample."""
        logs = [np.log(values) for values in self._inputs(n_params, data, len(self.params))]
        out: Array = self.law.predict(self.params, np.stack(logs, axis=1)[:, None, :])[:, 0]
        return out

    def losses_at(self, params: Array, n_params: Array, data: Array) -> Array:
        """Return the loss in nats (problems, points) by params (problems, parameters).

        Sizes and data are the same for all problems (points), or each problem's own (problems, points).
        """
        z = np.log(np.stack(self._inputs(n_params, data, data.shape), axis=-1))
        return self.law.predict(params, z)

    def loss_of(self, rows: pd.DataFrame) -> Array:
        """Return the estimate's loss in nats at rows of a points table (points)."""
        out: Array = self.law.predict(self.params[:1], np.log(self.law.x(rows)))[0]
        return out

    def data(self, iterations: float | None, tokens: float) -> float:
        """Return the law's data input after `iterations`, or at `tokens` if those are None."""
        if iterations is None:
            return tokens
        return iterations if self.law.counts_iterations else self.tokens(iterations)

    def tokens(self, iterations: float) -> float:
        """Return the tokens on which this architecture trains in so many iterations."""
        there = self.frame.loc[self.frame["iterations"] == iterations, "tokens"]
        return float(there.median()) if len(there) else self.tokens_an_iteration * iterations

    @cached_property
    def tokens_an_iteration(self) -> float:
        """Median number of tokens of one iteration."""
        return float((self.frame["tokens"] / self.frame["iterations"]).median())

    @property
    def tokens_a_unit(self) -> float:
        """Number of tokens of one unit of the law's data input."""
        return self.tokens_an_iteration if self.law.counts_iterations else 1.0

    @cached_property
    def support(self) -> Support:
        """Sizes and amounts of data, as the law counts them, at which this law may be read."""
        columns = [SIZE.column, *([self.law.data.column] if self.law.data else [])]
        sizes, *data = (self.frame[column].to_numpy(dtype=np.float64) for column in columns)
        return Support.of(sizes, data[0] if data else None)

    @property
    def sizes(self) -> Array:
        """Trained sizes in ascending order."""
        return np.unique(self.frame["n_params"].to_numpy(dtype=np.float64))

    def middle(self, column: str) -> float:
        """Return the mean logarithm of a column of the points; 0 for a curve without points."""
        return float(np.log(self.frame[column]).mean()) if len(self.frame) else 0.0

    @cached_property
    def _held(self) -> dict[str, float]:
        further = [one for one in self.law.inputs if one.axis is None]
        return {one.column: one.held_at(self.frame[one.column]) for one in further}

    def _inputs(
        self, n_params: Array | float, data: Array | float, shape: int | tuple[int, ...]
    ) -> list[Array]:
        """Return each input of the law in that shape, further ones at the value they are held at."""
        on_axes = {"size": n_params, "data": data}
        values = (on_axes[one.axis] if one.axis else self._held[one.column] for one in self.law.inputs)
        return [np.broadcast_to(value, shape) for value in values]

    @cached_property
    def counts_flops(self) -> bool:
        """True if every point has FLOPs of its own."""
        return bool(self.frame["flops"].notna().all())

    @cached_property
    def flops(self) -> Array:
        """Training FLOPs of the points: their own if all have them, else 6 n_params tokens."""
        counts = (
            self.frame["flops"] if self.counts_flops else 6.0 * self.frame["n_params"] * self.frame["tokens"]
        )
        out: Array = counts.to_numpy(dtype=np.float64)
        return out

    @property
    def flop_convention(self) -> str:
        """Name of the count that `flops` follows."""
        return "flops" if self.counts_flops else "6 n_params tokens"

    @cached_property
    def log_rate(self) -> LogRate:
        """Function of log sizes (any shape) that gives log FLOPs a token, fitted to the points."""
        size, tokens = (self.frame[name].to_numpy(dtype=np.float64) for name in ("n_params", "tokens"))
        return log_rate_of(size, self.flops / tokens)


def reference_of(architectures: Sequence[str], named: str | None) -> str:
    """Return the named reference, by default cross_transformer or the first in sorted order; raises InputError."""
    if named is None:
        return DEFAULT_REFERENCE if DEFAULT_REFERENCE in architectures else sorted(architectures)[0]
    if named not in architectures:
        raise InputError(
            f"--reference {named}: there is no such architecture; choose one of {', '.join(architectures)}."
        )
    return named


def size_at(curve: Curve, loss: Array, data: float) -> Array:
    """Return the n_params (1 + resamples) that reach `loss` with that data: inf if no size does, 0 if all do."""
    return _reaching(lambda n_params: curve.loss(n_params, data), loss, curve.middle("n_params"))


def data_at(curve: Curve, loss: Array, n_params: float) -> Array:
    """Return the data input (1 + resamples) with which that size reaches `loss`: inf if none does, 0 if all do."""
    column = curve.law.data.column if curve.law.data else "tokens"
    return _reaching(lambda data: curve.loss(n_params, data), loss, curve.middle(column))


def _reaching(curve: Callable[[Array], Array], loss: Array, near: float) -> Array:
    """Solve a curve for `loss` by bisection on the logarithm, which needs no formula of the law.

    A curve may fall over part of the logarithms only, as that of a law whose exponents move: the fall through `loss`
    that is closest to `near` counts.
    """
    low, high = np.full(len(loss), SMALLEST), np.full(len(loss), LARGEST)
    never = ~(curve(np.exp(high)) < loss)
    always = curve(np.exp(low)) < loss
    if (never | always).any():
        (low, high), (never, always) = _bracket(curve, loss, near)
    for _ in range(36):
        middle = 0.5 * (low + high)
        reached = curve(np.exp(middle)) < loss
        low, high = np.where(reached, low, middle), np.where(reached, middle, high)
    out: Array = np.where(never, np.inf, np.where(always, 0.0, np.exp(0.5 * (low + high))))
    return out


def _bracket(
    curve: Callable[[Array], Array], loss: Array, near: float
) -> tuple[tuple[Array, Array], tuple[Mask, Mask]]:
    """Return the ends of the fall through `loss` closest to `near`, and masks of curves never and always below it."""
    at = np.linspace(SMALLEST, LARGEST, BRACKETS + 1)
    below = np.stack([curve(np.exp(np.full(len(loss), one))) < loss for one in at])
    falls = ~below[:-1] & below[1:]
    middle = 0.5 * (at[:-1] + at[1:])
    away = np.where(falls, np.abs(middle - near)[:, None], np.inf)
    chosen = np.argmin(away, axis=0)
    always: Mask = np.asarray(below.all(axis=0))
    never: Mask = np.asarray(~falls.any(axis=0) & ~always)
    return (at[chosen], at[chosen + 1]), (never, always)


def central(values: Array) -> Interval | None:
    """Return the central 95 % of the resamples; one in which no size reaches the loss counts as a ratio of 0."""
    drawn = values[1:]
    if len(drawn) < 2:
        return None
    low, high = np.percentile(np.nan_to_num(drawn, nan=0.0, posinf=1e300), [2.5, 97.5], method="nearest")
    return float(low), float(high)


def open_end(interval: Interval | None, always: str) -> str:
    """Return why an interval of ratios has no end, or an empty string.

    `always` says where a law lies below the loss throughout: "at any size", "with any training".
    """
    if interval is None or 0 < interval[0] <= interval[1] < UNBOUNDED:
        return ""
    ends = []
    if interval[0] <= 0:
        ends.append("never reach the loss")
    if interval[1] >= UNBOUNDED:
        ends.append(f"are below the loss {always}")
    return f"its 95 % interval has no end: too many resamples {' or '.join(ends)}"


def rungs(base: Curve, curves: Mapping[str, Curve]) -> list[Rung]:
    """Return the sizes and lengths at which the reference was trained, the largest size first.

    Lengths are iterations, or tokens if a curve lacks iterations. Of more than MAX_RUNGS those are kept that lie
    furthest apart, from the largest compute on; of those that agree up to the factor SAME, one.
    """
    counted = all(curve.frame["iterations"].notna().all() for curve in curves.values())
    pairs = base.frame[["n_params", "iterations" if counted else "tokens"]].to_numpy(dtype=np.float64)
    pairs = np.unique(pairs, axis=0)
    logs = np.log(pairs)
    kept = [int(np.argmax(logs.sum(axis=1)))]
    far = np.abs(logs - logs[kept[0]]).max(axis=1)
    while len(kept) < min(MAX_RUNGS, len(pairs)) and far.max() > np.log(SAME):
        kept.append(int(np.argmax(far)))
        far = np.minimum(far, np.abs(logs - logs[kept[-1]]).max(axis=1))
    chosen = sorted(map(tuple, pairs[kept].tolist()), key=lambda pair: (-pair[0], pair[1]))
    return [
        Rung(size, length, base.tokens(length)) if counted else Rung(size, None, length)
        for size, length in chosen
    ]


def thinned(values: Array, most: int) -> Array:
    """Return at most so many of the values, evenly spaced, with both ends."""
    return values if len(values) <= most else values[spaced(len(values), most)]


def spaced(count: int, most: int) -> list[int]:
    """Return the places of at most so many of `count` things, evenly spaced, with both ends."""
    if count <= most:
        return list(range(count))
    places: list[int] = np.linspace(0, count - 1, most).round().astype(int).tolist()
    return places
