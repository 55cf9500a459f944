"""Compute gain along the frontier: each architecture at its own compute-optimal size.

L_opt(C) is the least loss of a law for C training FLOPs, over all sizes. For a budget C of the reference, C' solves
L_arm,opt(C') = L_ref,opt(C), and the gain is C / C'. It is identified only if both optima are supported: the budget
lies among those that the architecture was trained with, and the optimal size among the sizes trained there.

Where the losses of several sizes show the least loss of a budget themselves (`equal_compute.py`), the identified gain
is theirs, not the law's: a law that misses the losses by .5 % is wrong by a tenth in compute.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from analysis import text as wording
from analysis.findings.curve import Curve, thinned
from analysis.findings.equal_compute import equal_compute
from analysis.findings.equal_loss import Judged, Verdict
from analysis.findings.law_optimum import REACH, LawOptimum, law_optimum, refined, rough
from analysis.findings.least_losses import SAME, LeastLosses
from analysis.findings.note import Frozen
from analysis.findings.parabola import CLOSED
from analysis.findings.rungs import rungs_of
from analysis.fitting.bootstrap import interval
from analysis.laws.law import Array, Interval

BUDGETS = 5  # at which the frontiers are compared
BEYOND = float(np.log(100.0))
"""Distance in ln C outside an architecture's trained budgets up to which its frontier is searched."""
STEP = 0.4  # of the table in ln C from which the search starts


class FrontierGain(Frozen):
    """Training FLOPs of the reference over those of the architecture, each at its own compute-optimal size.

    `gain` and `ci95` are null unless the gain is identified; `by` says whether they are those of the `losses` or of the
    `law`. `observed` is the value of the least losses at equal compute, null if they do not show it. `estimate` is the
    laws' value even if an optimum lies outside the trained budgets or the sizes trained there.
    """

    architecture: str
    reference_flops: float
    reference_n_params: float | None
    loss: float | None
    flops: float | None
    n_params: float | None
    gain: float | None
    ci95: Interval | None
    estimate: float | None
    estimate_ci95: Interval | None
    status: Verdict
    reason: str
    by: Literal["losses", "law"] | None
    observed: float | None
    observed_ci95: Interval | None
    flop_convention: str


def frontier_gains(
    curves: Mapping[str, Curve], reference: str, resampled: Mapping[str, Array] | None = None
) -> list[FrontierGain]:
    """Compare every architecture's frontier with the reference's at a few of its budgets, the largest first.

    `resampled` are log losses (resamples, points) of every architecture, in the order of its curve's frame; without
    them nothing is `observed`. A law without size or data has no frontier. FLOPs are the points' own if all
    architectures have them, else 6ND.
    """
    law = curves[reference].law
    if law.size is None or law.data is None:
        return []
    if not all(curve.counts_flops for curve in curves.values()):
        curves = {name: _counted_plainly(curve) for name, curve in curves.items()}
    base = curves[reference]
    log_flops = _budgets(base)
    found, runs = law_optimum(base, base.params, log_flops), _Runs.of(base)
    seen = {name: LeastLosses.of(equal_compute(curves[name], own)) for name, own in (resampled or {}).items()}
    return [
        gain
        for name, curve in curves.items()
        if name != reference
        for gain in _gains(
            _Pair(name, curve, base, runs, seen.get(name), seen.get(reference)), log_flops, found
        )
    ]


def _counted_plainly(curve: Curve) -> Curve:
    return replace(curve, frame=curve.frame.assign(flops=np.nan))


def _budgets(curve: Curve) -> Array:
    """Return log FLOPs, descending: budgets at which several sizes were trained, else from least to most."""
    log_flops = np.log(curve.flops)
    rungs, _ = rungs_of(np.log(curve.frame["n_params"].to_numpy(dtype=np.float64)), log_flops)
    levels = np.array([rung.log_flops for rung in rungs])
    if not len(levels):
        levels = np.linspace(log_flops.min(), log_flops.max(), BUDGETS)
    return thinned(levels, BUDGETS)[::-1]


@dataclass(frozen=True)
class _Arm:
    """An architecture at its optimum for one budget; `optimum` is False if the search ended before it."""

    name: str
    curve: Curve
    runs: _Runs
    log_flops: float
    log_size: float
    optimum: bool


@dataclass(frozen=True)
class _Pair:
    """An architecture and the reference, with what their losses show."""

    name: str
    curve: Curve
    base: Curve
    base_runs: _Runs
    seen: LeastLosses | None
    base_seen: LeastLosses | None


def _gains(pair: _Pair, log_flops: Array, found: LawOptimum) -> list[FrontierGain]:
    curve = pair.curve
    equal, own = _equal_compute(curve, found.loss)
    values = np.exp(np.where(found.inside, log_flops - equal, np.nan))
    runs = _Runs.of(curve)
    gains = []
    for i, at in enumerate(log_flops):
        there = (float(at), float(found.log_size[0, i]), bool(found.inside[0, i]))
        here = (float(equal[0, i]), float(own.log_size[0, i]), bool(own.inside[0, i]))
        arms = (
            _Arm("the reference", pair.base, pair.base_runs, *there),
            _Arm(wording.architecture(pair.name), curve, runs, *here),
        )
        verdict = _verdict(arms, here[0])
        rejected = curve.rejected_because or pair.base.rejected_because
        known = Judged.of(values[:, i], *verdict, "with the least compute searched", rejected)
        observed, ends = _observed(pair, there[0])
        has, by_losses = known.value is not None, verdict[0] == "identified" and observed is not None
        gains.append(
            FrontierGain(
                architecture=pair.name,
                reference_flops=float(np.exp(there[0])),
                reference_n_params=float(np.exp(there[1])) if there[2] else None,
                loss=float(found.loss[0, i]) if there[2] else None,
                flops=float(np.exp(here[0])) if has else None,
                n_params=float(np.exp(here[1])) if has else None,
                by="losses" if by_losses else "law" if known.status == "identified" else None,
                observed=observed,
                observed_ci95=ends,
                flop_convention=curve.flop_convention,
                gain=observed if by_losses else known.identified,
                ci95=ends if by_losses else known.identified_ci95,
                estimate=known.value,
                estimate_ci95=known.ci95,
                status="identified" if by_losses else known.status,
                reason="" if by_losses else known.reason,
            )
        )
    return gains


def _observed(pair: _Pair, log_flops: float) -> tuple[float | None, Interval | None]:
    """Return the gain that the losses show at a budget of the reference, and its interval; both or neither."""
    if pair.seen is None or pair.base_seen is None or not pair.base_seen.covers(log_flops):
        return None, None
    target = pair.base_seen.least(np.array([log_flops]))[:, 0]
    equal = pair.seen.budgets_of(target)
    drawn = equal[1:][np.isfinite(equal[1:])]
    if not pair.seen.covers(float(equal[0])) or len(drawn) < max(2, CLOSED * (len(equal) - 1)):
        return None, None
    low, high = interval(np.exp(log_flops - drawn))
    return float(np.exp(log_flops - equal[0])), (low, high)


def _equal_compute(curve: Curve, loss: Array) -> tuple[Array, LawOptimum]:
    """Return log FLOPs (resamples, budgets) whose least loss is `loss`, and the optimum there.

    Infinite if no budget searched has so low a loss, and minus infinity if all do. A table in ln C brackets the root;
    two secant steps leave an error in ln C below .0001.
    """
    trained = np.log(curve.flops)
    width = trained.max() - trained.min() + 2 * BEYOND
    table = np.linspace(trained.min() - BEYOND, trained.max() + BEYOND, int(np.ceil(width / STEP)) + 1)
    near = rough(curve, curve.params, table)
    losses, step = near.loss, table[1] - table[0]
    right = (losses[:, :, None] > loss[:, None, :]).sum(axis=1)
    never, always = right == len(table), right == 0
    right = np.clip(right, 1, len(table) - 1)
    rows = np.arange(len(losses))[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        slope = np.nan_to_num(step / (losses[rows, right] - losses[rows, right - 1]), posinf=0.0, neginf=0.0)
    at = table[right - 1] + np.clip((loss - losses[rows, right - 1]) * slope, 0.0, step)
    size = near.log_size[rows, right]
    for _ in range(2):
        size, least = refined(curve, curve.params, at, size)
        at = at + np.clip((loss - least) * slope, -step, step)
    own = law_optimum(curve, curve.params[:1], at[0])
    return np.where(never, np.inf, np.where(always, -np.inf, at)), own


def _verdict(arms: tuple[_Arm, _Arm], equal: float) -> tuple[Verdict, str]:
    for one in arms:
        if one.curve.unidentified_because:
            return "not_identified", one.curve.unidentified_because
    if not np.isfinite(equal):
        side = "more" if equal > 0 else "less"
        reason = f"the compute of {arms[1].name} at equal loss is over {np.exp(BEYOND):.0f} times {side} than trained"
        return "not_identified", reason
    beyond = []
    for one in arms:
        if not one.optimum:
            return "not_identified", (
                f"the compute-optimal size of {one.name} lies over {np.exp(REACH):.0f} times outside its trained sizes"
            )
        if outside := one.runs.outside(one.log_size, one.log_flops):
            beyond.append(f"{outside} of {one.name}")
    return ("extrapolated" if beyond else "identified"), " and ".join(beyond)


@dataclass(frozen=True)
class _Runs:
    """The range of a curve's runs: log FLOPs, and the least and largest log size at each, by the runs' convex hull."""

    least: float
    largest: float
    lower: tuple[Array, Array]
    upper: tuple[Array, Array]

    @classmethod
    def of(cls, curve: Curve) -> _Runs:
        x, y = np.log(curve.flops), np.log(curve.frame["n_params"].to_numpy(dtype=np.float64))
        below, depth = _upper_hull(x, -y)
        return cls(float(x.min()), float(x.max()), (below, -depth), _upper_hull(x, y))

    def outside(self, log_size: float, log_flops: float) -> str:
        """Return how far a size at a budget lies outside the runs, or an empty string if it lies among them."""
        sides = (
            (self.least - log_flops, "below the least"),
            (log_flops - self.largest, "above the largest"),
        )
        for distance, side in sides:
            if distance > SAME:
                return f"the compute is {wording.times(float(np.exp(distance)))} times {side}"
        low, high = (np.interp(log_flops, *hull) for hull in (self.lower, self.upper))
        for distance, side in ((low - log_size, "below"), (log_size - high, "above")):
            if distance > SAME:
                times = wording.times(float(np.exp(distance)))
                return f"the optimal size is {times} times {side} those trained with such compute"
        return ""


def _upper_hull(x: Array, y: Array) -> tuple[Array, Array]:
    """Return the corners of the upper convex hull of points by ascending x (Andrew 1979)."""
    order = np.lexsort((-y, x))
    first = np.unique(x[order], return_index=True)[1]
    hull: list[tuple[float, float]] = []
    for point in zip(x[order][first].tolist(), y[order][first].tolist(), strict=True):
        while len(hull) > 1 and _turn(hull[-2], hull[-1], point) >= 0:
            hull.pop()
        hull.append(point)
    corners = np.array(hull)
    return corners[:, 0], corners[:, 1]


def _turn(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> float:
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])
