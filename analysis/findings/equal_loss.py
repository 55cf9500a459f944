"""Savings of one architecture against another at equal loss: parameters, compute and tokens, each with its interval.

After the same iterations (else tokens D) and for a reference size N_ref, N' solves L_arch(N', D) = L_ref(N_ref, D). The
size ratio is N_ref / N', the compute gain the ratio of their FLOPs. At equal size D' solves
L_arch(N_ref, D') = L_ref(N_ref, D), and the token gain is D / D'. A number is identified only if both laws are read
inside the support of their own runs (analysis.findings.support).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeVar

import numpy as np

from analysis import text as wording
from analysis.findings.curve import Curve, Rung, central, data_at, open_end, rungs, size_at
from analysis.findings.note import Frozen
from analysis.findings.support import SAME, Place
from analysis.laws.law import Array, Interval

Verdict = Literal["identified", "extrapolated", "not_identified"]

# Least relative fall in loss over the trained sizes, or budgets, of a law that depends on them.
FLATTEST = 1e-4
ONE_BUDGET = 1.25  # the budgets of one IsoFLOP rung vary by about 10 % either way


class AtEqualLoss(Frozen):
    """The budget, the reference size and its loss at which an architecture is compared with the reference."""

    architecture: str
    iterations: float | None
    tokens: float
    reference_n_params: float
    loss: float


Row = TypeVar("Row", bound=AtEqualLoss)


class SizeRatio(AtEqualLoss):
    """N_ref / N' at equal loss and budget.

    `ratio` and `ci95` are null unless the ratio is identified. `estimate` is the laws' value even if a law is read
    outside the support of its runs, or the residuals reject it. `ends_supported` is false if an end of the interval
    lies outside the support.
    """

    n_params: float | None
    ratio: float | None
    ci95: Interval | None
    estimate: float | None
    estimate_ci95: Interval | None
    ends_supported: bool | None = None
    status: Verdict
    reason: str


class ComputeGain(AtEqualLoss):
    """Training FLOPs of the reference over those of the architecture at equal loss and budget."""

    reference_flops: float | None
    flops: float | None
    gain: float | None
    ci95: Interval | None
    status: Verdict


class TokenGain(Frozen):
    """Tokens of the reference over those of the architecture at equal loss and equal size.

    `gain` and `ci95` are null unless the gain is identified. `estimate` is the laws' value even if a law is read
    outside the support of its runs.
    """

    architecture: str
    iterations: float | None
    reference_tokens: float
    reference_n_params: float
    loss: float
    tokens: float | None
    gain: float | None
    ci95: Interval | None
    estimate: float | None
    estimate_ci95: Interval | None
    status: Verdict
    reason: str


@dataclass(frozen=True)
class Judged:
    """A ratio with its interval as the laws give it, the part that is identified, and the reason for the rest."""

    value: float | None
    ci95: Interval | None
    status: Verdict
    reason: str

    @property
    def identified(self) -> float | None:
        """Value of an identified ratio."""
        return self.value if self.status == "identified" else None

    @property
    def identified_ci95(self) -> Interval | None:
        """Interval of an identified ratio."""
        return self.ci95 if self.status == "identified" else None

    @classmethod
    def of(cls, values: Array, status: Verdict, reason: str, always: str, rejected: str = "") -> Judged:
        """Judge a ratio (1 + resamples) of a status; one whose interval has no end is not identified (`open_end`).

        Nor is one of a law that is `rejected` for a reason; its value is kept.
        """
        ends = central(values)
        if status != "not_identified" and (end := open_end(ends, always)):
            status, reason = "not_identified", end
        if status == "not_identified":
            return cls(None, None, status, reason)
        if rejected:
            status, reason = "not_identified", f"{rejected}; {reason}" if reason else rejected
        return cls(float(values[0]), ends, status, reason)


@dataclass(frozen=True)
class _Comparison:
    """Two curves, and the rung of the reference at which they are compared."""

    architecture: str
    curve: Curve
    base: Curve
    rung: Rung

    @cached_property
    def data(self) -> tuple[float, float]:
        """Data inputs at which the architecture's and the reference's law are read."""
        at = (self.rung.iterations, self.rung.tokens)
        return self.curve.data(*at), self.base.data(*at)

    @cached_property
    def loss(self) -> Array:
        """Loss of the reference (1 + resamples)."""
        return self.base.loss(self.rung.n_params, self.data[1])

    @property
    def unidentified_because(self) -> str:
        return self.curve.unidentified_because or self.base.unidentified_because

    @property
    def rejected_because(self) -> str:
        return self.curve.rejected_because or self.base.rejected_because

    @property
    def name(self) -> str:
        return wording.architecture(self.architecture)

    def outside(self, own: Place, own_is: str) -> str:
        """Return how far the architecture's place, or the reference's, lies outside the support of its runs."""
        other = self.base.support.place(self.rung.n_params, self.data[1])
        reasons = own.reason(own_is, self.name), other.reason("the reference size", "the reference")
        return " and ".join(reason for reason in reasons if reason)


@dataclass(frozen=True)
class Compared:
    """A size ratio with its values (1 + resamples) and compute gain, None without a ratio or FLOPs of the points."""

    ratio: SizeRatio
    gain: ComputeGain | None
    values: Array


def size_ratios(curves: Mapping[str, Curve], reference: str) -> list[Compared]:
    """Compare every architecture with the reference at the reference's trained rungs, the largest size first."""
    return [_size_ratio(one) for one in _comparisons(curves, reference, rungs(curves[reference], curves))]


def compare_at(curves: Mapping[str, Curve], reference: str, rung: Rung) -> dict[str, Compared]:
    """Compare every architecture with the reference at one size and length, whether trained or not."""
    return {one.architecture: _size_ratio(one) for one in _comparisons(curves, reference, [rung])}


def token_gains(curves: Mapping[str, Curve], reference: str) -> list[TokenGain]:
    """Compare every architecture with the reference at equal size, at the reference's trained rungs."""
    return [_token_gain(one) for one in _comparisons(curves, reference, rungs(curves[reference], curves))]


def headline_of(rows: Iterable[SizeRatio], architecture: str | None = None) -> SizeRatio | None:
    """Return the ratio, of an architecture or of any, at the largest compute of the reference where it is identified.

    If no ratio is identified, it is chosen among those with a number, else among all; None without rows.
    """
    own = [row for row in rows if architecture in {None, row.architecture}]
    own = (
        [row for row in own if row.ratio is not None]
        or [row for row in own if row.estimate is not None]
        or own
    )
    return at_the_top(own)


def at_the_top(rows: Sequence[Row]) -> Row | None:
    """Return the row at the largest compute of the reference; None without rows.

    Of the rungs with that compute, up to the factor ONE_BUDGET, the one with the lowest loss counts, then the largest.
    """
    most = max((_compute(row) for row in rows), default=0.0)
    top = [row for row in rows if _compute(row) * ONE_BUDGET >= most]
    return min(top, key=lambda row: (row.loss, -row.reference_n_params), default=None)


def beyond_headline(rows: Iterable[SizeRatio], headline: SizeRatio) -> SizeRatio | None:
    """Return the ratio at the largest compute of the reference, if the laws give one beyond an identified headline."""
    last = max((row for row in rows if row.architecture == headline.architecture), key=_compute)
    further = headline.ratio is not None and _compute(last) > _compute(headline) * ONE_BUDGET
    return last if further and last.estimate is not None else None


def _compute(row: AtEqualLoss) -> float:
    """Return what the reference's training FLOPs are in proportion to."""
    return row.reference_n_params * row.tokens


def _comparisons(curves: Mapping[str, Curve], reference: str, at: Sequence[Rung]) -> list[_Comparison]:
    base = curves[reference]
    return [
        _Comparison(name, curve, base, rung)
        for name, curve in curves.items()
        if name != reference
        for rung in at
    ]


def _size_ratio(at: _Comparison) -> Compared:
    n_params = size_at(at.curve, at.loss, at.data[0])
    with np.errstate(divide="ignore"):
        ratio = at.rung.n_params / n_params
    judged = Judged.of(ratio, *_verdict_on_size(at, n_params), "at any size", at.rejected_because)
    ends = None
    if judged.ci95 is not None:
        places = [at.curve.support.place(at.rung.n_params / end, at.data[0]) for end in judged.ci95]
        ends = all(place.inside for place in places)
    found = SizeRatio(
        architecture=at.architecture,
        iterations=at.rung.iterations,
        tokens=at.rung.tokens,
        reference_n_params=at.rung.n_params,
        loss=float(at.loss[0]),
        n_params=None if judged.value is None else float(n_params[0]),
        ratio=judged.identified,
        ci95=judged.identified_ci95,
        estimate=judged.value,
        estimate_ci95=judged.ci95,
        ends_supported=ends,
        status=judged.status,
        reason=judged.reason,
    )
    return Compared(found, None if judged.value is None else _compute_gain(at, found, n_params), ratio)


def _compute_gain(at: _Comparison, ratio: SizeRatio, n_params: Array) -> ComputeGain | None:
    reference = _flops(at.base, np.full(len(n_params), at.rung.n_params), at.rung)
    own = _flops(at.curve, n_params, at.rung)
    if reference is None or own is None:
        return None
    gain = reference / own
    return ComputeGain(
        **ratio.model_dump(include=set(AtEqualLoss.model_fields)),
        reference_flops=float(reference[0]),
        flops=float(own[0]),
        gain=float(gain[0]),
        ci95=central(gain),
        status=ratio.status,
    )


def _verdict_on_size(at: _Comparison, n_params: Array) -> tuple[Verdict, str]:
    name, loss = at.name, float(at.loss[0])
    arms = ((name, at.curve, at.data[0]), ("the reference", at.base, at.data[1]))
    for arm, curve, data in arms:
        smallest, largest = curve.loss(curve.sizes[0], data)[0], curve.loss(curve.sizes[-1], data)[0]
        if smallest < largest * (1 + FLATTEST):
            return "not_identified", f"the fitted loss of {arm} does not fall with size"
    if at.unidentified_because:
        return "not_identified", at.unidentified_because
    equal = float(n_params[0])
    if not np.isfinite(equal):
        reason = f"no size of {name} reaches a loss of {loss:.4f} at this budget by its fitted law"
        return "not_identified", reason
    if equal <= 1.0:
        return "not_identified", f"every size of {name} is below a loss of {loss:.4f} by its fitted law"
    outside = at.outside(at.curve.support.place(equal, at.data[0]), "the equal size")
    if outside:
        return "extrapolated", outside
    if _spans(central(n_params), at.curve.support.sizes_at(at.data[0])):
        return "not_identified", f"the 95 % interval of the equal size spans all trained sizes of {name}"
    return "identified", ""


def _spans(ends: Interval | None, trained: Interval) -> bool:
    """Return True if an interval reaches beyond what was trained at both ends: then the runs exclude nothing."""
    return ends is not None and ends[0] * SAME < trained[0] and trained[1] * SAME < ends[1]


def _flops(curve: Curve, n_params: Array, rung: Rung) -> Array | None:
    """Return the training FLOPs of sizes; None if the points have none, or one size only."""
    if not curve.counts_flops or len(curve.sizes) < 2:
        return None
    own_tokens = rung.tokens if rung.iterations is None else curve.tokens(rung.iterations)
    out: Array = np.exp(curve.log_rate(np.log(np.clip(n_params, 1.0, 1e18)))) * own_tokens
    return out


def _token_gain(at: _Comparison) -> TokenGain:
    data = data_at(at.curve, at.loss, at.rung.n_params)
    tokens = data * at.curve.tokens_a_unit
    with np.errstate(divide="ignore"):
        gain = at.rung.tokens / tokens
    judged = Judged.of(gain, *_verdict_on_tokens(at, data), "with any training", at.rejected_because)
    return TokenGain(
        architecture=at.architecture,
        iterations=at.rung.iterations,
        reference_tokens=at.rung.tokens,
        reference_n_params=at.rung.n_params,
        loss=float(at.loss[0]),
        tokens=None if judged.value is None else float(tokens[0]),
        gain=judged.identified,
        ci95=judged.identified_ci95,
        estimate=judged.value,
        estimate_ci95=judged.ci95,
        status=judged.status,
        reason=judged.reason,
    )


def _verdict_on_tokens(at: _Comparison, data: Array) -> tuple[Verdict, str]:
    name, curve, equal = at.name, at.curve, float(data[0])
    trained = curve.frame["tokens"].to_numpy(dtype=np.float64)
    if at.unidentified_because:
        return "not_identified", at.unidentified_because
    first, last = (
        curve.loss(at.rung.n_params, end / curve.tokens_a_unit)[0] for end in (trained.min(), trained.max())
    )
    if first < last * (1 + FLATTEST):
        return "not_identified", f"the fitted loss of {name} does not fall with training"
    if not np.isfinite(equal) or equal <= 1.0:
        return "not_identified", f"no amount of training gives {name} a loss of {at.loss[0]:.4f} there"
    outside = at.outside(curve.support.place(at.rung.n_params, equal), "the reference size")
    if outside:
        return "extrapolated", outside
    if _spans(central(data), curve.support.data_at(at.rung.n_params)):
        return "not_identified", f"the 95 % interval of the equal budget spans all trained budgets of {name}"
    return "identified", ""
