"""The compute-optimal size three ways: IsoFLOP parabolas, the lower envelope, and the fitted law.

A parabola in ln N is only the second order of the true curve: fitted to sizes that lie to one side of the minimum it is
biased even without noise (arXiv 2603.22339). The bias is measured here, on the fitted law at the very same sizes and
budgets, where the true minimum is known, and taken off. Where compute was not held equal, the curve of each
size is interpolated to equal compute, and what that does is in the same correction.

Everything is linear in the log losses once the sizes of each parabola are chosen, so resamples cost a product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from analysis.findings.curve import Curve
from analysis.fitting.bootstrap import interval
from analysis.laws.law import Array, Interval

if TYPE_CHECKING:
    import pandas as pd

Method = Literal["equal_flops", "interpolated"]
Standing = Literal["centred", "off_centre", "edge"]

SAME_FLOPS = 0.03  # relative difference of budgets that count as one
FEWEST = 4  # sizes for a parabola with a residual
EACH_SIDE = 3  # sizes on either side of the lowest that a parabola takes
LEVELS = 10  # budgets at which curves are interpolated
OFF_CENTRE = 0.25  # share of the sampled width by which a minimum may lie off its middle
BIASED = float(np.log(1.1))
DRAWS = 300  # resampled laws whose minima make an interval
REACH = float(np.log(1e3))  # how far outside the trained sizes a law's minimum is looked for


@dataclass(frozen=True)
class Rung:
    """One budget: its sizes in ascending order, and the log losses there as weights of the points (sizes, points)."""

    flops: float
    sizes: Array
    weights: Array

    def window(self, y: Array) -> slice:
        """Sizes about the lowest of the log losses y (points)."""
        lowest = int(np.argmin(self.weights @ y))
        low = max(0, min(lowest - EACH_SIDE, len(self.sizes) - FEWEST))
        return slice(low, min(len(self.sizes), max(lowest + EACH_SIDE + 1, low + FEWEST)))

    def vertex(self, y: Array, window: slice) -> Array:
        """ln N at the minimum of the parabola through log losses y (problems, points); nan where it has none."""
        at = np.log(self.sizes[window])
        middle = at.mean()
        design = np.linalg.pinv(np.vander(at - middle, 3, increasing=True)) @ self.weights[window]
        _, slope, bend = design @ y.T
        with np.errstate(divide="ignore", invalid="ignore"):
            found: Array = np.where(bend > 0, middle - slope / (2 * bend), np.nan)
        return found


@dataclass(frozen=True)
class Optimum:
    """The compute-optimal size at one budget; None where a method has none."""

    flops: float
    sizes: int
    isoflop: float | None
    corrected: float | None
    bias: float | None  # factor by which the parabola misses on the fitted law
    envelope: float | None
    parametric: float
    standing: Standing


@dataclass(frozen=True)
class Exponent:
    """N_opt proportional to C^value, with the 95 % interval where resamples give one."""

    value: float
    ci95: Interval | None
    budgets: int


@dataclass(frozen=True)
class OptimalSizes:
    """Every estimate for one architecture; `reason` says why there is none."""

    method: Method | None
    flop_convention: str
    optima: tuple[Optimum, ...]
    exponents: dict[str, Exponent]
    reason: str


def power_law(x: Array, y: Array, log_sd: Array | None = None) -> tuple[float, float]:
    """Exponent and coefficient of y = c x^a by least squares in logarithms, weighted by 1/log_sd^2."""
    root = np.ones(len(x)) if log_sd is None else 1.0 / np.asarray(log_sd)
    design = np.column_stack([np.log(x), np.ones(len(x))])
    slope, offset = np.linalg.lstsq(design * root[:, None], np.log(y) * root, rcond=None)[0]
    return float(slope), float(np.exp(offset))


def optimal_sizes(curve: Curve, resampled: Array) -> OptimalSizes:
    """Estimates of the compute-optimal size from one architecture's points and its law.

    `resampled` are log losses (resamples, points) for the intervals, the points in the order of the curve's frame.
    """
    frame = curve.frame
    counted = bool(frame["flops"].notna().all())
    convention = "flops" if counted else "6 n_params tokens"
    flops = (frame["flops"] if counted else 6.0 * frame["n_params"] * frame["tokens"]).to_numpy(
        dtype=np.float64
    )
    rungs, method = rungs_of(frame, flops)
    if curve.law.size is None or curve.law.data is None:
        return OptimalSizes(None, convention, (), {}, "the law has no trade between size and data")
    if len(rungs) < 2:
        return OptimalSizes(
            None, convention, (), {}, f"fewer than 2 budgets were reached by {FEWEST} sizes each"
        )
    y = np.log(frame["loss"].to_numpy(dtype=np.float64))
    fitted = np.log(curve.loss_of_points())
    optima, drawn = [], []
    for rung in rungs:
        optimum, spread = _optimum(curve, rung, flops, y, fitted, resampled)
        optima.append(optimum)
        drawn.append(spread)
    return OptimalSizes(method, convention, tuple(optima), _exponents(curve, flops, optima, drawn), "")


def rungs_of(frame: pd.DataFrame, flops: Array) -> tuple[list[Rung], Method]:
    """Budgets with enough sizes: as trained where compute was held equal, else where the sizes' curves overlap."""
    size = frame["n_params"].to_numpy(dtype=np.float64)
    order = np.argsort(flops, kind="stable")
    steps = np.flatnonzero(np.diff(np.log(flops[order])) > SAME_FLOPS) + 1
    groups = [part for part in np.split(order, steps) if len(np.unique(size[part])) >= FEWEST]
    tight = [part for part in groups if flops[part].max() <= flops[part].min() * (1 + SAME_FLOPS)]
    if len(tight) >= 2:
        return [_as_trained(size, flops, part) for part in tight], "equal_flops"
    return _interpolated(size, flops), "interpolated"


def _as_trained(size: Array, flops: Array, rows: NDArray[np.int64]) -> Rung:
    sizes = np.unique(size[rows])
    weights = np.zeros((len(sizes), len(size)))
    for i, value in enumerate(sizes):
        own = rows[size[rows] == value]
        weights[i, own] = 1.0 / len(own)
    return Rung(float(np.exp(np.log(flops[rows]).mean())), sizes, weights)


def _interpolated(size: Array, flops: Array) -> list[Rung]:
    spans = {}
    for value in np.unique(size):
        own = flops[size == value]
        if own.max() > own.min() * (1 + SAME_FLOPS):
            spans[float(value)] = (own.min() * (1 - 1e-12), own.max() * (1 + 1e-12))
    if len(spans) < FEWEST:
        return []
    grid = np.geomspace(min(low for low, _ in spans.values()), max(high for _, high in spans.values()), 200)
    covered = [c for c in grid if sum(low <= c <= high for low, high in spans.values()) >= FEWEST]
    if not covered or covered[-1] < 2 * covered[0]:
        return []
    rungs = []
    for level in np.geomspace(covered[0], covered[-1], LEVELS):
        sizes = [value for value, (low, high) in spans.items() if low <= level <= high]
        if len(sizes) >= FEWEST:
            rows = np.array([_between(flops, size == value, float(level)) for value in sizes])
            rungs.append(Rung(float(level), np.array(sizes), rows))
    return rungs


def _between(flops: Array, own: NDArray[np.bool_], target: float) -> Array:
    """Weights of the points (points) that interpolate one size's log loss, linear in ln C, to a target."""
    levels = np.unique(flops[own])
    right = int(np.clip(np.searchsorted(levels, target), 1, len(levels) - 1))
    low, high = levels[right - 1], levels[right]
    share = float(np.clip(np.log(target / low) / np.log(high / low), 0.0, 1.0))
    weights = np.zeros(len(flops))
    for level, part in ((low, 1.0 - share), (high, share)):
        rows = own & (flops == level)
        weights[rows] = part / rows.sum()
    return weights


def _optimum(
    curve: Curve, rung: Rung, flops: Array, y: Array, fitted: Array, resampled: Array
) -> tuple[Optimum, Array]:
    window = rung.window(y)
    sampled = np.log(rung.sizes[window])
    vertex, missed = (float(rung.vertex(values[None], window)[0]) for values in (y, fitted))
    true = _law_optimum(curve, flops, rung.flops)
    inside = bool(sampled[0] < vertex < sampled[-1])
    bias = missed - true if np.isfinite(missed) else None
    width = sampled[-1] - sampled[0]
    off = inside and abs(vertex - 0.5 * (sampled[0] + sampled[-1])) > OFF_CENTRE * width
    lowest = int(np.argmin(rung.weights @ y))
    standing: Standing = "centred"
    if not inside:
        standing = "edge"
    elif off or bias is None or abs(bias) > BIASED:
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
    # Resamples scatter about the law; the interval belongs about the estimate.
    return optimum, rung.vertex(resampled, window) - missed + vertex - (bias or 0.0)


def _law_optimum(curve: Curve, flops: Array, budget: float) -> float:
    """ln N that minimises the law at a budget, at the FLOPs a token of the trained sizes."""
    return float(_law_optima(curve, curve.params[:1], flops, budget)[0][0])


def _law_optima(curve: Curve, params: Array, flops: Array, budget: float) -> tuple[Array, NDArray[np.bool_]]:
    """ln N (problems) that minimises the law with params (problems, parameters), and whether the grid ends there."""
    frame = curve.frame
    sizes = np.log(curve.sizes)
    per_token = flops / frame["tokens"].to_numpy(dtype=np.float64)
    n_params = np.log(frame["n_params"].to_numpy(dtype=np.float64))
    rates = np.array([np.log(np.median(per_token[n_params == value])) for value in sizes])
    slope = np.diff(rates) / np.diff(sizes)
    at = np.linspace(sizes[0] - REACH, sizes[-1] + REACH, 401)
    piece = np.clip(np.searchsorted(sizes, at) - 1, 0, len(slope) - 1)
    tokens = budget / np.exp(rates[piece] + slope[piece] * (at - sizes[piece]))
    loss = curve.losses_at(params, np.exp(at), tokens / curve.tokens_a_unit)
    lowest = np.argmin(loss, axis=1)
    edge = (lowest == 0) | (lowest == len(at) - 1)
    lowest = np.clip(lowest, 1, len(at) - 2)
    # Three neighbours of a fine grid: here a parabola is exact to far below what is asked.
    rows = np.arange(len(params))
    a, b, c = (loss[rows, lowest + step] for step in (-1, 0, 1))
    bend = a - 2 * b + c
    shift = np.where(bend > 0, 0.5 * (a - c) / np.where(bend > 0, bend, 1.0), 0.0)
    return at[lowest] + np.clip(shift, -1, 1) * (at[1] - at[0]), edge


def _exponents(
    curve: Curve, trained: Array, optima: list[Optimum], drawn: list[Array]
) -> dict[str, Exponent]:
    out = {}
    for name in ("isoflop", "corrected", "envelope", "parametric"):
        found = [(o.flops, getattr(o, name), i) for i, o in enumerate(optima) if getattr(o, name) is not None]
        if len(found) < 2:
            continue
        flops, sizes = np.array([f for f, _, _ in found]), np.array([n for _, n, _ in found])
        ci95 = None
        if name == "parametric":
            ci95 = _parametric_interval(curve, trained, flops)
        elif name == "corrected":
            ci95 = _slope_interval(np.log(flops), np.array([drawn[i] for _, _, i in found]))
        out[name] = Exponent(power_law(flops, sizes)[0], ci95, len(found))
    return out


def _slope_interval(log_flops: Array, vertices: Array) -> Interval | None:
    """Central 95 % of the slope over resamples (budgets, resamples), those in which every parabola has a minimum."""
    whole = vertices[:, np.isfinite(vertices).all(axis=0)]
    if whole.shape[1] < 0.5 * vertices.shape[1] or whole.shape[1] < 50:
        return None
    x = log_flops - log_flops.mean()
    return interval(x @ whole / (x @ x))


def _parametric_interval(curve: Curve, flops: Array, budgets: Array) -> Interval | None:
    """Central 95 % of the same slope by resampled laws; None where a minimum, theirs or the fit's, is out of reach."""
    params = curve.params[: DRAWS + 1]
    if len(params) < 3:
        return None
    found = [_law_optima(curve, params, flops, float(budget)) for budget in budgets]
    sizes = np.stack([at for at, _ in found])
    edge: NDArray[np.bool_] = np.logical_or.reduce(np.stack([out for _, out in found]), axis=0)
    if edge[0]:
        return None
    return _slope_interval(np.log(budgets), np.where(edge, np.nan, sizes)[:, 1:])
