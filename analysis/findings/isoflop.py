"""The compute-optimal size at each budget: IsoFLOP parabolas, the lower envelope, and the fitted law.

A parabola in ln N is only the second order of the true curve: fitted to sizes on one side of the minimum it is biased
even without noise (arXiv 2603.22339). The bias is measured on the fitted law at the same sizes and budget, where the
true minimum is known, and subtracted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from analysis import text as wording
from analysis.findings.curve import Curve
from analysis.findings.equal_compute import DRAWS, Budget, equal_compute
from analysis.findings.equal_loss import Verdict
from analysis.findings.exponents import Exponent, exponent_of
from analysis.findings.law_optimum import REACH, LawOptimum, law_optimum
from analysis.findings.note import Note
from analysis.findings.parabola import CLOSED, WINDOW
from analysis.findings.rungs import FEWEST, MAX_BUDGETS, Method, Rung
from analysis.fitting.bootstrap import interval
from analysis.laws.law import Array, Interval

Standing = Literal["centred", "off_centre", "edge"]

OFF_CENTRE = 0.25  # largest distance of a minimum from the middle, as a share of the sampled width
BIASED = float(np.log(1.1))  # bias from which on a parabola counts as off centre
DISAGREE = (
    0.25  # least share of the budgets at which the law and the parabolas exclude each other, for a note
)
METHODS = ("isoflop", "corrected", "envelope", "parametric")


@dataclass(frozen=True)
class Optimum:
    """The compute-optimal size at one budget by each method; None if a method has none.

    `reasons` says by method why it has no size or no interval. `parametric_beyond` is the factor by which the law's
    optimum lies outside the sizes trained at this budget, 1 if it lies among them.
    """

    flops: float
    sizes: int
    isoflop: float | None
    corrected: float | None
    bias: float | None  # factor by which the parabola misses the minimum of the fitted law
    envelope: float | None
    parametric: float | None
    standing: Standing
    isoflop_ci95: Interval | None = None
    corrected_ci95: Interval | None = None
    parametric_ci95: Interval | None = None
    parametric_status: Verdict = "identified"
    parametric_beyond: float | None = 1.0
    reasons: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class OptimalSizes:
    """All estimates for one architecture; `reason` says why there are none, `missing` why a method has no exponent.

    `left_out` has the run ids of points so far off the law that no parabola may pass through them.
    """

    method: Method | None
    flop_convention: str
    optima: tuple[Optimum, ...]
    exponents: dict[str, Exponent]
    reason: str
    missing: dict[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Method:
    """One method at one budget: its size, the interval, why one of them is missing, and the draws of ln N (resamples).

    A draw is nan where the resample has no minimum near the sampled sizes.
    """

    size: float | None
    ci95: Interval | None
    reason: str
    drawn: Array

    @classmethod
    def of(cls, log_size: float | None, drawn: Array, reason: str = "") -> _Method:
        """Take the central 95 % of the draws, unless there is no size or too few draws have a minimum."""
        if log_size is None:
            return cls(None, None, reason, drawn)
        closed = drawn[np.isfinite(drawn)]
        if len(drawn) >= 2 and len(closed) >= CLOSED * len(drawn):
            return cls(float(np.exp(log_size)), interval(np.exp(closed)), reason, drawn)
        share = 1 - len(closed) / max(1, len(drawn))
        why = f"no interval: {share:.0%} of the resamples have no minimum near the sampled sizes"
        return cls(float(np.exp(log_size)), None, "; ".join(one for one in (reason, why) if one), drawn)


@dataclass(frozen=True)
class _Estimate:
    """One budget's optimum, and the draws of each method."""

    optimum: Optimum
    drawn: dict[str, Array]


def optimal_sizes(curve: Curve, resampled: Array) -> OptimalSizes:
    """Estimate the compute-optimal sizes from one architecture's points and its law.

    `resampled` are log losses (resamples, points) for the intervals, the points in the order of the curve's frame.
    """
    own = equal_compute(curve, resampled)
    reason = ""
    if curve.law.size is None or curve.law.data is None:
        reason = "the law has no trade-off between size and data"
    elif len(own.rungs) < 2:
        reason = f"fewer than 2 budgets have {FEWEST} trained sizes each"
    if reason:
        return OptimalSizes(None, curve.flop_convention, (), {}, reason, left_out=own.left_out)
    found = law_optimum(
        own.curve, curve.params[: DRAWS + 1], np.array([rung.log_flops for rung in own.rungs])
    )
    estimates = [_estimate(one, found.at(i)) for i, one in enumerate(own.budgets)]
    exponents, missing = {}, {}
    for name in METHODS:
        exponent = _exponent(name, estimates)
        if isinstance(exponent, str):
            missing[name] = exponent
        else:
            exponents[name] = exponent
    optima = tuple(one.optimum for one in estimates)
    return OptimalSizes(own.method, curve.flop_convention, optima, exponents, "", missing, own.left_out)


def optima_notes(name: str, found: OptimalSizes) -> Iterator[Note]:
    """Yield notes on an architecture's optimal sizes: not all budgets were estimated, or the law misses the losses."""
    if len(found.optima) >= MAX_BUDGETS:
        text = f"compute-optimal sizes of {name} are those of {MAX_BUDGETS} budgets, evenly spaced among its own."
        yield Note("budgets_thinned", text)
    both = [one for one in found.optima if one.corrected_ci95 and one.parametric_ci95]
    apart = [one for one in both if _apart(one.corrected_ci95, one.parametric_ci95)]
    if len(apart) >= max(2, DISAGREE * len(both)):
        worst = max(apart, key=lambda one: abs(np.log((one.corrected or 1.0) / (one.parametric or 1.0))))
        text = (
            f"at {len(apart)} of {len(both)} budgets the optimal size of {name} by its law lies outside what the "
            f"losses there show, by their 95 % intervals: {wording.human(worst.parametric or 0)} against "
            f"{wording.human(worst.corrected or 0)} at {wording.number(worst.flops)} FLOPs. Use the parabolas."
        )
        yield Note("optima_disagree", text)


def _apart(one: Interval | None, other: Interval | None) -> bool:
    """Return True if two intervals do not overlap."""
    return one is not None and other is not None and (one[1] < other[0] or other[1] < one[0])


def _estimate(budget: Budget, law: LawOptimum) -> _Estimate:
    parabola, values = budget.parabola, budget.values
    rung, sampled = parabola.rung, parabola.sampled
    low, high = rung.log_sizes[0], rung.log_sizes[-1]
    at = float(parabola.vertex(values[None])[0])
    scattered, missed = parabola.vertex(values + budget.deviation), parabola.vertex(budget.by_law)
    bias = np.where(law.inside[:, 0], missed - law.log_size[:, 0], np.nan)
    count = min(len(scattered), len(bias) - 1)
    drawn = {"isoflop": scattered, "corrected": scattered[:count] - bias[1 : count + 1]}
    for name, sizes in drawn.items():
        close = (low - WINDOW < sizes) & (sizes < high + WINDOW)
        drawn[name] = np.where(close, sizes, np.nan)
    inside = bool(sampled[0] < at < sampled[-1])
    edge = "" if inside else _edge(rung, values)
    refused = edge or _refused(at - float(bias[0]), float(bias[0]), rung)
    status, beyond, why = _verdict(rung, law)
    methods = {
        "isoflop": _Method.of(at if inside else None, drawn["isoflop"], edge),
        "corrected": _Method.of(None if refused else at - float(bias[0]), drawn["corrected"], refused),
        "parametric": _Method.of(
            None if beyond is None else float(law.log_size[0, 0]),
            np.where(law.inside[1:, 0], law.log_size[1:, 0], np.nan),
            why,
        ),
    }
    reasons = {name: one.reason for name, one in methods.items() if one.reason}
    lowest = int(np.argmin(rung.at_sizes(values)))
    best = float(np.exp(rung.log_sizes[lowest])) if 0 < lowest < len(rung.log_sizes) - 1 else None
    if best is None:
        reasons["envelope"] = _edge(rung, values)
    off = abs(at - 0.5 * (sampled[0] + sampled[-1])) > OFF_CENTRE * (sampled[-1] - sampled[0])
    standing: Standing = "edge" if not inside else "centred"
    if inside and (off or not abs(bias[0]) <= BIASED):
        standing = "off_centre"
    optimum = Optimum(
        flops=float(np.exp(rung.log_flops)),
        sizes=len(rung.log_sizes),
        isoflop=methods["isoflop"].size,
        corrected=methods["corrected"].size,
        bias=float(np.exp(bias[0])) if np.isfinite(bias[0]) else None,
        envelope=best,
        parametric=methods["parametric"].size,
        standing=standing,
        isoflop_ci95=methods["isoflop"].ci95,
        corrected_ci95=methods["corrected"].ci95,
        parametric_ci95=methods["parametric"].ci95,
        parametric_status=status,
        parametric_beyond=beyond,
        reasons=reasons,
    )
    return _Estimate(optimum, {name: one.drawn for name, one in methods.items()})


def _refused(corrected: float, bias: float, rung: Rung) -> str:
    """Return why a correction is refused: there is no bias to subtract, or it leads out of the sampled sizes."""
    if not np.isfinite(corrected):
        return "the fitted law has no minimum near these sizes from which to measure the bias"
    if rung.log_sizes[0] <= corrected <= rung.log_sizes[-1]:
        return ""
    side = "below the smallest" if bias > 0 else "above the largest"
    by = wording.times(float(np.exp(abs(bias))))
    return f"the correction by a factor {by} leads {side} of {len(rung.log_sizes)} sampled sizes"


def _edge(rung: Rung, values: Array) -> str:
    """Return why a rung's sampled sizes hold no minimum."""
    losses, sizes = rung.at_sizes(values), np.exp(rung.log_sizes)
    lowest = int(np.argmin(losses))
    if lowest in {0, len(losses) - 1}:
        side = "smallest" if lowest == 0 else "largest"
        return f"the lowest loss is that of the {side} of {len(sizes)} sizes, {wording.human(float(sizes[lowest]))}"
    return "the parabola has no minimum inside the sampled sizes"


def _verdict(rung: Rung, law: LawOptimum) -> tuple[Verdict, float | None, str]:
    """Return the standing of the law's optimum, its factor outside the rung's sizes, and the reason."""
    if not law.inside[0, 0]:
        side = "below the smallest" if law.below[0, 0] else "above the largest"
        return (
            "not_identified",
            None,
            f"the law's optimum lies over {np.exp(REACH):.0f} times {side} trained size",
        )
    at, low, high = law.log_size[0, 0], rung.log_sizes[0], rung.log_sizes[-1]
    beyond = float(np.exp(max(low - at, at - high, 0.0)))
    if beyond <= 1:
        return "identified", 1.0, ""
    side = "below the smallest" if at < low else "above the largest"
    return "extrapolated", beyond, f"{wording.times(beyond)} times {side} size trained at this budget"


def _exponent(name: str, estimates: list[_Estimate]) -> Exponent | str:
    """Return the exponent of a method, or why it has none; the law's from optima among the sizes, if two are."""
    reason = ""
    kept = [one for one in estimates if getattr(one.optimum, name) is not None]
    if name == "parametric":
        identified = [one for one in kept if one.optimum.parametric_status == "identified"]
        if len(identified) >= 2:
            kept = identified
        elif kept:
            reason = "the law's optima lie outside the sizes trained at their budgets"
    if len(kept) < 2:
        why = next((one.optimum.reasons[name] for one in estimates if name in one.optimum.reasons), "")
        return f"{len(kept)} of {len(estimates)} budgets have an optimum" + (f": {why}" if why else "")
    flops = np.array([one.optimum.flops for one in kept])
    sizes = np.array([getattr(one.optimum, name) for one in kept])
    if name == "envelope":
        return exponent_of(
            flops, sizes, None, "no interval: the best trained size moves in steps of the grid"
        )
    return exponent_of(flops, sizes, np.array([one.drawn[name] for one in kept]), reason)
