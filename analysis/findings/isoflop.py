"""The compute-optimal size by three methods: IsoFLOP parabolas, the lower envelope, and the fitted law.

A parabola in ln N is only the second order of the true curve: fitted to sizes on one side of the minimum it is biased
even without noise (arXiv 2603.22339). The bias is measured on the fitted law at the same sizes and budgets, where the
true minimum is known, and subtracted. If compute was not held equal, the curve of each size is interpolated to equal
compute; the correction includes the error of that.

Once the sizes of each parabola are chosen, a vertex is linear in the log losses, so that resamples cost one product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from analysis.findings.curve import Curve, spaced
from analysis.fitting.bootstrap import interval
from analysis.laws.law import Array, Interval

if TYPE_CHECKING:
    import pandas as pd

Method = Literal["equal_flops", "interpolated"]
Weights = Any
"""An array (sizes, points) or scipy's sparse one, which has the same operators."""
Rate = Callable[[Array], Array]
"""Returns log FLOPs a token at log sizes."""
Standing = Literal["centred", "off_centre", "edge"]

SAME_FLOPS = 0.03  # largest relative difference of budgets that count as one
FEWEST = 4  # sizes of a parabola with a residual
EACH_SIDE = 3  # sizes of a parabola on either side of the lowest
OFF_CENTRE = 0.25  # largest distance of a minimum from the middle, as a share of the sampled width
MAX_BUDGETS = 200  # budgets of which optima are estimated
DENSE = 4096  # points up to which weights are held as a full matrix
DRAWS = 300  # resampled laws whose minima make an interval
REACH = float(np.log(1e3))  # distance outside the trained sizes up to which a law's minimum is searched


@dataclass(frozen=True)
class Rung:
    """One budget: its sizes in ascending order, and their log losses as weights of the points (sizes, points)."""

    flops: float
    sizes: Array
    weights: Weights

    def window(self, y: Array) -> slice:
        """Return the slice of sizes around the lowest of the log losses y (points)."""
        lowest = int(np.argmin(self.weights @ y))
        low = max(0, min(lowest - EACH_SIDE, len(self.sizes) - FEWEST))
        return slice(low, min(len(self.sizes), max(lowest + EACH_SIDE + 1, low + FEWEST)))

    def vertex(self, y: Array, window: slice) -> Array:
        """Return ln N at the minimum of the parabola through log losses y (problems, points); nan if it has none."""
        at = np.log(self.sizes[window])
        middle = at.mean()
        weights = self.weights[window]
        if not isinstance(weights, np.ndarray):
            used = np.unique(weights.indices)
            weights, y = weights[:, used].toarray(), y[:, used]
        design = np.linalg.pinv(np.vander(at - middle, 3, increasing=True)) @ weights
        _, slope, bend = design @ y.T
        with np.errstate(divide="ignore", invalid="ignore"):
            found: Array = np.where(bend > 0, middle - slope / (2 * bend), np.nan)
        return found


@dataclass(frozen=True)
class Optimum:
    """The compute-optimal size at one budget by each method; None if a method has none."""

    flops: float
    sizes: int
    isoflop: float | None
    corrected: float | None
    bias: float | None  # factor by which the parabola misses the minimum of the fitted law
    envelope: float | None
    parametric: float
    standing: Standing


@dataclass(frozen=True)
class Exponent:
    """N_opt is proportional to C^value; the 95 % interval is None if resamples give none."""

    value: float
    ci95: Interval | None
    budgets: int


@dataclass(frozen=True)
class OptimalSizes:
    """All estimates for one architecture; `reason` says why there are none."""

    method: Method | None
    flop_convention: str
    optima: tuple[Optimum, ...]
    exponents: dict[str, Exponent]
    reason: str


def power_law(x: Array, y: Array, log_sd: Array | None = None) -> tuple[float, float]:
    """Return a and c of y = c x^a by least squares in logarithms, weighted by 1/log_sd^2."""
    root = np.ones(len(x)) if log_sd is None else 1.0 / np.asarray(log_sd)
    design = np.column_stack([np.log(x), np.ones(len(x))])
    slope, offset = np.linalg.lstsq(design * root[:, None], np.log(y) * root, rcond=None)[0]
    return float(slope), float(np.exp(offset))


def optimal_sizes(curve: Curve, resampled: Array) -> OptimalSizes:
    """Estimate the compute-optimal sizes from one architecture's points and its law.

    `resampled` are log losses (resamples, points) for the intervals, the points in the order of the curve's frame.
    """
    frame = curve.frame
    counted = bool(frame["flops"].notna().all())
    convention = "flops" if counted else "6 n_params tokens"
    counts = frame["flops"] if counted else 6.0 * frame["n_params"] * frame["tokens"]
    flops = counts.to_numpy(dtype=np.float64)
    rungs, method = rungs_of(frame, flops)
    rungs = [rungs[place] for place in spaced(len(rungs), MAX_BUDGETS)]
    reason = ""
    if curve.law.size is None or curve.law.data is None:
        reason = "the law has no trade-off between size and data"
    elif len(rungs) < 2:
        reason = f"fewer than 2 budgets have {FEWEST} trained sizes each"
    if reason:
        return OptimalSizes(None, convention, (), {}, reason)
    y = np.log(frame["loss"].to_numpy(dtype=np.float64))
    fitted = np.log(curve.loss_of(frame))
    rate = curve.log_rate(flops)
    optima, drawn = zip(*(_optimum(curve, rung, rate, y, fitted, resampled) for rung in rungs), strict=True)
    return OptimalSizes(method, convention, optima, _exponents(curve, rate, optima, drawn), "")


def rungs_of(frame: pd.DataFrame, flops: Array) -> tuple[list[Rung], Method]:
    """Return the budgets with enough sizes: as trained if compute was held equal, else where the curves overlap."""
    size = frame["n_params"].to_numpy(dtype=np.float64)
    order = np.argsort(flops, kind="stable")
    steps = np.flatnonzero(np.diff(np.log(flops[order])) > SAME_FLOPS) + 1
    groups = [part for part in np.split(order, steps) if len(np.unique(size[part])) >= FEWEST]
    tight = [part for part in groups if flops[part].max() <= flops[part].min() * (1 + SAME_FLOPS)]
    if len(tight) >= 2:
        return [_as_trained(size, flops, part) for part in tight], "equal_flops"
    return _interpolated(size, flops), "interpolated"


def _as_trained(size: Array, flops: Array, rows: NDArray[np.int64]) -> Rung:
    sizes, which = np.unique(size[rows], return_inverse=True)
    weights = _matrix([(own, np.full(len(own), 1.0 / len(own))) for own in _grouped(rows, which)], len(size))
    return Rung(float(np.exp(np.log(flops[rows]).mean())), sizes, weights)


def _interpolated(size: Array, flops: Array) -> list[Rung]:
    spans = {}
    values, which = np.unique(size, return_inverse=True)
    for value, rows in zip(values, _grouped(np.arange(len(size)), which), strict=True):
        levels, at = np.unique(flops[rows], return_inverse=True)
        if levels[-1] > levels[0] * (1 + SAME_FLOPS):
            ends = levels[0] * (1 - 1e-12), levels[-1] * (1 + 1e-12)
            spans[float(value)] = (*ends, levels, _grouped(rows, at))
    if len(spans) < FEWEST:
        return []
    lows, highs = (np.array([span[end] for span in spans.values()]) for end in (0, 1))
    grid = np.geomspace(lows.min(), highs.max(), 200)
    covered = [c for c in grid if ((lows <= c) & (c <= highs)).sum() >= FEWEST]
    if not covered or covered[-1] < 2 * covered[0]:
        return []
    rungs = []
    for level in np.geomspace(covered[0], covered[-1], 10):
        there = {value: span for value, span in spans.items() if span[0] <= level <= span[1]}
        if len(there) >= FEWEST:
            weights = [_between(levels, own, float(level)) for _, _, levels, own in there.values()]
            rungs.append(Rung(float(level), np.array(list(there)), _matrix(weights, len(size))))
    return rungs


def _grouped(rows: NDArray[np.int64], which: NDArray[np.intp]) -> list[NDArray[np.int64]]:
    """Split rows by the number of their group, each in their order."""
    return np.split(rows[np.argsort(which, kind="stable")], np.cumsum(np.bincount(which))[:-1])


def _between(
    levels: Array, rows: Sequence[NDArray[np.int64]], target: float
) -> tuple[NDArray[np.int64], Array]:
    """Return rows and weights that interpolate one size's log loss, linear in ln C, to a target."""
    right = int(np.clip(np.searchsorted(levels, target), 1, len(levels) - 1))
    share = float(
        np.clip(np.log(target / levels[right - 1]) / np.log(levels[right] / levels[right - 1]), 0.0, 1.0)
    )
    parts = ((rows[right - 1], 1.0 - share), (rows[right], share))
    weights = [np.full(len(own), part / len(own)) for own, part in parts]
    return np.concatenate([own for own, _ in parts]), np.concatenate(weights)


def _matrix(rows: Sequence[tuple[NDArray[np.int64], Array]], points: int) -> Weights:
    """Return weights (sizes, points) of the points and weights of each size; sparse for very many points."""
    if points <= DENSE:
        dense = np.zeros((len(rows), points))
        for out, (own, values) in zip(dense, rows, strict=True):
            out[own] = values
        return dense
    from scipy.sparse import csr_array

    ends = np.cumsum([0, *(len(own) for own, _ in rows)])
    own, values = (np.concatenate(parts) for parts in zip(*rows, strict=True))
    return csr_array((values, own, ends), shape=(len(rows), points))


def _optimum(
    curve: Curve, rung: Rung, rate: Rate, y: Array, fitted: Array, resampled: Array
) -> tuple[Optimum, Array]:
    window = rung.window(y)
    sampled = np.log(rung.sizes[window])
    vertex, missed = (float(rung.vertex(values[None], window)[0]) for values in (y, fitted))
    true = float(_law_optima(curve, curve.params[:1], rate, rung.flops)[0][0])
    inside = bool(sampled[0] < vertex < sampled[-1])
    bias = missed - true if np.isfinite(missed) else None
    width = sampled[-1] - sampled[0]
    off = inside and abs(vertex - 0.5 * (sampled[0] + sampled[-1])) > OFF_CENTRE * width
    lowest = int(np.argmin(rung.weights @ y))
    standing: Standing = "centred"
    if not inside:
        standing = "edge"
    elif off or bias is None or abs(bias) > np.log(1.1):
        standing = "off_centre"
    optimum = Optimum(
        flops=rung.flops,
        sizes=len(rung.sizes),
        isoflop=float(np.exp(vertex)) if inside else None,
        corrected=float(np.exp(vertex - bias)) if inside and bias is not None else None,
        bias=None if bias is None else float(np.exp(bias)),
        envelope=float(rung.sizes[lowest]) if 0 < lowest < len(rung.sizes) - 1 else None,
        parametric=float(np.exp(true)),
        standing=standing,
    )
    # Resamples scatter around the law; the interval is moved to lie around the estimate.
    return optimum, rung.vertex(resampled, window) - missed + vertex - (bias or 0.0)


def _law_optima(curve: Curve, params: Array, rate: Rate, budget: float) -> tuple[Array, NDArray[np.bool_]]:
    """Return ln N (problems) that minimises the law with params (problems, parameters), and a mask of grid ends.

    A size costs the FLOPs a token that `Curve.log_rate` gives it.
    """
    sizes = np.log(curve.sizes)
    at = np.linspace(sizes[0] - REACH, sizes[-1] + REACH, 401)
    tokens = budget / np.exp(rate(at))
    loss = curve.losses_at(params, np.exp(at), tokens / curve.tokens_a_unit)
    lowest = np.argmin(loss, axis=1)
    edge = (lowest == 0) | (lowest == len(at) - 1)
    lowest = np.clip(lowest, 1, len(at) - 2)
    # Through three neighbours of a fine grid a parabola is more than exact enough.
    rows = np.arange(len(params))
    a, b, c = (loss[rows, lowest + step] for step in (-1, 0, 1))
    bend = a - 2 * b + c
    shift = np.where(bend > 0, 0.5 * (a - c) / np.where(bend > 0, bend, 1.0), 0.0)
    return at[lowest] + np.clip(shift, -1, 1) * (at[1] - at[0]), edge


def _exponents(
    curve: Curve, rate: Rate, optima: Sequence[Optimum], drawn: Sequence[Array]
) -> dict[str, Exponent]:
    out = {}
    for name in ("isoflop", "corrected", "envelope", "parametric"):
        kept = [i for i, one in enumerate(optima) if getattr(one, name) is not None]
        if len(kept) < 2:
            continue
        flops = np.array([optima[i].flops for i in kept])
        ci95 = None
        if name == "parametric":
            ci95 = _parametric_interval(curve, rate, flops)
        elif name == "corrected":
            ci95 = _slope_interval(np.log(flops), np.array([drawn[i] for i in kept]))
        sizes = np.array([getattr(optima[i], name) for i in kept])
        out[name] = Exponent(power_law(flops, sizes)[0], ci95, len(kept))
    return out


def _slope_interval(log_flops: Array, vertices: Array) -> Interval | None:
    """Return the central 95 % of the slope of vertices (budgets, resamples), where every parabola has a minimum."""
    whole = vertices[:, np.isfinite(vertices).all(axis=0)]
    if whole.shape[1] < 0.5 * vertices.shape[1] or whole.shape[1] < 50:
        return None
    x = log_flops - log_flops.mean()
    return interval(x @ whole / (x @ x))


def _parametric_interval(curve: Curve, rate: Rate, budgets: Array) -> Interval | None:
    """Return the central 95 % of the slope by resampled laws; None if minima lie outside the searched sizes."""
    params = curve.params[: DRAWS + 1]
    if len(params) < 3:
        return None
    found = [_law_optima(curve, params, rate, float(budget)) for budget in budgets]
    sizes = np.stack([at for at, _ in found])
    edge: NDArray[np.bool_] = np.logical_or.reduce(np.stack([out for _, out in found]), axis=0)
    if edge[0]:
        return None
    return _slope_interval(np.log(budgets), np.where(edge, np.nan, sizes)[:, 1:])
