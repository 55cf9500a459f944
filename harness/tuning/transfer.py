"""Learning rates from finished trials: the optimum of each size, and a power law that carries it to other sizes.

Near its minimum the loss is a parabola in the logarithm of the learning rate. Its vertex is a better estimate than the
best trial, and resampling the trials gives its interval. Across sizes the optimum follows a power law (Kaplan et al.
2020, arXiv 2001.08361, appendix D; Bjorck et al. 2024, arXiv 2409.19913), fitted to the vertices by least squares, each
weighted by its own error.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.study.tune import RateLaw, SizeRate, Tuned, TunedArchitecture, TunedSize, rounded
from harness.tuning.space import RATE, SearchCase, Space
from harness.tuning.trials import TrialRecord, finished

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]

RESAMPLES = 1000
NEAR = math.log(10.0) / 2
"""Distance of log learning rates from the best trial's within which a trial is near the minimum: half a decade."""
FEWEST = 5
"""Trials nearest to the best one that a parabola is fitted to at any distance."""
FEWEST_DISTINCT = 4
"""Distinct learning rates that a parabola needs: it fits any three exactly, noise included."""
EDGE = 0.1
"""Share of the searched range, at each end, where an optimum is at the edge."""
LEAST_ERROR = 0.02
"""Smallest standard error of an optimum's logarithm, since the loss is not exactly a parabola."""


@dataclass(frozen=True)
class Optimum:
    """The minimum of one size: log learning rate, its standard error and its 95 % interval."""

    log_rate: float
    error: float
    ci95: tuple[float, float]
    n_near: int
    """Trials near the minimum."""
    is_vertex: bool
    """True if it is a parabola's vertex, False if it is the best trial."""


@dataclass(frozen=True)
class Note:
    """A warning about a learning rate, with a code."""

    code: str
    text: str


def find_optimum(rates: Sequence[float], losses: Sequence[float]) -> Optimum:
    """Find the minimum of the trials' losses against the logarithms of their learning rates."""
    import numpy as np

    x, y = np.log(np.asarray(rates, dtype=float)), np.asarray(losses, dtype=float)
    vertices, n_near, are_vertices = _vertices(x[None], y[None])
    rows = np.random.default_rng(0).integers(len(x), size=(RESAMPLES, len(x)))
    draws, _, _ = _vertices(x[rows], y[rows])
    vertex, is_vertex = float(vertices[0]), bool(are_vertices[0])
    low, high = (float(end) for end in np.quantile(draws, (0.025, 0.975)))
    error = max(LEAST_ERROR, float(draws.std()))
    if not is_vertex:  # the minimum lies between the trials beside the best one, or within half a decade
        below = float(x.max(where=x < vertex, initial=-np.inf))
        above = float(x.min(where=x > vertex, initial=np.inf))
        below = below if below > -np.inf else vertex - NEAR
        above = above if above < np.inf else vertex + NEAR
        low, high, error = min(low, below), max(high, above), max(error, (above - below) / (2 * 1.96))
    return Optimum(vertex, error, (min(low, vertex), max(high, vertex)), int(n_near[0]), is_vertex)


def _vertices(x: Floats, y: Floats) -> tuple[Floats, npt.NDArray[np.int_], npt.NDArray[np.bool_]]:
    """Return for each row of (samples, trials) the minimum, the number of trials near it, and True if it is a vertex.

    The minimum is the vertex of a parabola through the points near the lowest; without a vertex among them, the lowest.
    """
    import numpy as np

    best = x[np.arange(len(x)), y.argmin(axis=1)][:, None]
    away = x - best
    reach = np.sort(np.abs(away), axis=1)[:, min(FEWEST, x.shape[1]) - 1 :][:, :1]
    near = np.abs(away) <= np.maximum(NEAR, reach) + 1e-9
    in_order = np.sort(np.where(near, x, np.inf), axis=1)
    steps = in_order[:, 1:] > in_order[:, :-1]
    distinct = 1 + (steps & np.isfinite(in_order[:, 1:])).sum(axis=1)
    powers = np.stack([np.ones_like(away), away, away**2], axis=2) * near[:, :, None]
    solved = np.linalg.pinv(powers) @ (y * near)[:, :, None]
    slope, curvature = solved[:, 1, 0], solved[:, 2, 0]
    bends = (distinct >= FEWEST_DISTINCT) & (curvature > 0)
    shift = -slope / np.where(bends, 2 * curvature, np.inf)
    lowest = np.where(near, away, np.inf).min(axis=1)
    highest = np.where(near, away, -np.inf).max(axis=1)
    found = bends & (lowest <= shift) & (shift <= highest)
    return best[:, 0] + np.where(found, shift, 0.0), near.sum(axis=1), found


def fit_law(scales: Sequence[float], optima: Sequence[Optimum]) -> RateLaw | None:
    """Fit the power law to the optima of two sizes or more; return None with fewer.

    If the optima scatter about it by more than their own errors, its covariance grows with the scatter.
    """
    import numpy as np

    if len(set(scales)) < 2:
        return None
    x = np.log(np.asarray(scales, dtype=float))
    y = np.array([optimum.log_rate for optimum in optima])
    weights = 1 / np.array([optimum.error for optimum in optima])
    centre = x.mean()
    line, covariance = np.polyfit(x - centre, y, 1, w=weights, cov="unscaled")
    if free := len(x) - 2:
        off = weights * (y - np.polyval(line, x - centre))
        covariance *= max(1.0, float(off @ off) / free)
    # Move the intercept from the centre of the sizes to x = 1.
    shift = np.array([[1.0, 0.0], [-centre, 1.0]])
    (var_slope, both), (_, var_intercept) = (shift @ covariance @ shift.T).tolist()
    slope, level = line.tolist()
    half = 1.96 * math.sqrt(var_slope)
    return RateLaw(
        intercept=level - slope * float(centre),
        slope=slope,
        slope_ci95=(slope - half, slope + half),
        covariance=(var_intercept, both, var_slope),
    )


def learn(
    space: Space, records: Mapping[SearchCase, Sequence[TrialRecord]]
) -> tuple[Tuned | None, list[Note]]:
    """Fit the trials; return the content of tuned.json, None without a learning rate, and notes."""
    if not space.searches_rate:
        text = f"{RATE} was not searched: the best trials are told, and nothing is carried to other sizes"
        return None, [Note("rate_not_searched", text)]
    notes: list[Note] = []
    facts: list[Any] = []
    architectures = {}
    for architecture in space.study.grid.architectures:
        sizes, scales, optima = [], [], []
        for case, trials in records.items():
            if case.architecture != architecture:
                continue
            if not (ended := finished(trials)):
                notes.append(Note("no_trial", f"{architecture} {case.size}: no trial finished"))
                continue
            pairs = sorted({(float(one.values[RATE]), loss) for one, loss in ended})
            facts.append([case.name, pairs])
            optimum = find_optimum([rate for rate, _ in pairs], [loss for _, loss in pairs])
            notes += _doubts(space, case, optimum)
            best, best_loss = min(ended, key=lambda one: one[1])
            low, high = optimum.ci95
            sizes.append(
                TunedSize(
                    size=case.size,
                    n_params=case.n_params,
                    d_model=case.d_model,
                    lr=rounded(math.exp(optimum.log_rate)),
                    ci95=(rounded(math.exp(low)), rounded(math.exp(high))),
                    n_trials=len(pairs),
                    best=best.values,
                    best_loss=best_loss,
                )
            )
            scales.append(getattr(case, space.tune.scale_by))
            optima.append(optimum)
        if sizes:
            law = fit_law(scales, optima)
            carried = _carry(space, architecture, law) if law else ()
            architectures[str(architecture)] = TunedArchitecture(sizes=sizes, law=law, carried=carried)
            if law is None:
                text = f"{architecture}: one size tells no slope; tune two or more to carry the learning rate to others"
                notes.append(Note("one_size", text))
    others = [key for key in space.dimensions if key != RATE]
    if others and architectures:
        text = f"the best learning rate is that of trials in which {', '.join(others)} varied too"
        notes.append(Note("others_varied", text))
    if not architectures:
        return None, notes
    tuned = Tuned(
        study=space.study.name,
        scale_by=space.tune.scale_by,
        iterations=space.iterations,
        fingerprint=hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest(),
        architectures=architectures,
    )
    return tuned, notes


def _carry(space: Space, architecture: str, law: RateLaw) -> tuple[SizeRate, ...]:
    carried = []
    for size in space.study.grid.sizes:
        if size not in space.tune.sizes:
            case = space.describe(architecture, size)
            rate, interval = law.at(getattr(case, space.tune.scale_by))
            carried.append(
                SizeRate(size=size, n_params=case.n_params, d_model=case.d_model, lr=rate, ci95=interval)
            )
    return tuple(carried)


def _doubts(space: Space, case: SearchCase, optimum: Optimum) -> list[Note]:
    where, rate, one = f"{case.architecture} {case.size}", math.exp(optimum.log_rate), space.dimensions[RATE]
    if one.choices is None:
        margin = (one.high / one.low) ** EDGE
        end = f"low {one.low:g}" if rate < one.low * margin else f"high {one.high:g}"
        if not one.low * margin <= rate <= one.high / margin:
            text = f"{where}: the best learning rate, {rounded(rate):g}, is at the edge of its range, {end}; search on"
            return [Note("optimum_at_edge", text)]
    if not optimum.is_vertex:
        text = (
            f"{where}: the {optimum.n_near} trials near the best show no minimum between them; the best one's learning "
            "rate is taken as it is; give it more trials"
        )
        return [Note("no_vertex", text)]
    return []
