"""Savings of one architecture against another at equal loss: parameters, compute and tokens, each with its interval.

After the same iterations (else tokens D) and for a reference size N_ref, N' solves L_arch(N', D) = L_ref(N_ref, D). The
size ratio is N_ref / N', the compute gain the ratio of their FLOPs. At equal size D' solves
L_arch(N_ref, D') = L_ref(N_ref, D), and the token gain is D / D'. A number is identified only if both laws are read
inside the sizes and budgets that their architectures were trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from analysis import text as wording
from analysis.findings.curve import Curve, central, data_at, lengths_of, open_end, size_at
from analysis.findings.note import Frozen
from analysis.laws.law import Array, Interval

Verdict = Literal["identified", "extrapolated", "not_identified"]

# Least relative fall in loss over the trained sizes, or budgets, of a law that depends on them.
FLATTEST = 1e-4
SAME_DATA = 1.01  # amounts of data that differ by no more than this factor count as one
MAX_SIZES = 8


class AtEqualLoss(Frozen):
    """The budget, the reference size and its loss at which an architecture is compared with the reference."""

    architecture: str
    iterations: float | None
    tokens: float
    reference_n_params: float
    loss: float


class SizeRatio(AtEqualLoss):
    """N_ref / N' at equal loss and budget.

    `ratio` and `ci95` are null unless the ratio is identified. `estimate` is the laws' value even if the equal size or
    the budget lies outside the trained ones, or the residuals reject the law.
    """

    n_params: float | None
    ratio: float | None
    ci95: Interval | None
    estimate: float | None
    estimate_ci95: Interval | None
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

    `gain` and `ci95` are null unless the gain is identified. `estimate` is the laws' value even if D' or N_ref lies
    outside the budgets or sizes that the architecture was trained on.
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
class _Comparison:
    """Two curves, and the budget and reference size at which they are compared."""

    architecture: str
    curve: Curve
    base: Curve
    iterations: float | None
    tokens: float
    size: float

    @cached_property
    def data(self) -> tuple[float, float]:
        """Data inputs at which the architecture's and the reference's law are read."""
        return self.curve.data(self.iterations, self.tokens), self.base.data(self.iterations, self.tokens)

    @cached_property
    def loss(self) -> Array:
        """Loss of the reference (1 + resamples)."""
        return self.base.loss(self.size, self.data[1])

    @property
    def unidentified_because(self) -> str:
        return self.curve.unidentified_because or self.base.unidentified_because

    @property
    def rejected_because(self) -> str:
        return self.curve.rejected_because or self.base.rejected_because


def size_ratios(curves: Mapping[str, Curve], reference: str) -> list[tuple[SizeRatio, ComputeGain | None]]:
    """Compare every architecture with the reference at each length and reference size, the largest size first.

    The compute gain is None if there is no ratio or the points have no FLOPs.
    """
    sizes = curves[reference].sizes[::-1]
    sizes = sizes if len(sizes) <= MAX_SIZES else sizes[:1]
    return [_size_ratio(one) for one in _comparisons(curves, reference, sizes)]


def top_size_ratios(curves: Mapping[str, Curve], reference: str) -> list[SizeRatio]:
    """Compare every architecture with the reference at its largest size and longest training, as headlines do."""
    longest = max(lengths_of(curves[reference], curves), key=lambda length: length[1])
    at = _comparisons(curves, reference, curves[reference].sizes[-1:], [longest])
    return [_size_ratio(one)[0] for one in at]


def compare_at(
    curves: Mapping[str, Curve], reference: str, n_params: float, iterations: float | None, tokens: float
) -> dict[str, SizeRatio]:
    """Compare every architecture with the reference at one size and length."""
    at = _comparisons(curves, reference, np.array([n_params]), [(iterations, tokens)])
    return {one.architecture: _size_ratio(one)[0] for one in at}


def token_gains(curves: Mapping[str, Curve], reference: str) -> list[TokenGain]:
    """Compare every architecture with the reference at each length and the largest reference size."""
    return [_token_gain(one) for one in _comparisons(curves, reference, curves[reference].sizes[-1:])]


def _comparisons(
    curves: Mapping[str, Curve],
    reference: str,
    sizes: Array,
    lengths: list[tuple[float | None, float]] | None = None,
) -> list[_Comparison]:
    base = curves[reference]
    lengths = lengths or lengths_of(base, curves)
    return [
        _Comparison(name, curve, base, iterations, tokens, float(size))
        for name, curve in curves.items()
        if name != reference
        for size in sizes
        for iterations, tokens in lengths
    ]


def ratio_fields(
    quantity: str, values: Array, status: Verdict, reason: str, always: str, rejected: str
) -> dict[str, Any]:
    """Return the fields of a ratio (1 + resamples); one whose interval has no end is not identified (`open_end`).

    Nor is one of a law that the residuals reject; its estimate is kept, with the reason.
    """
    ends = central(values)
    if status != "not_identified" and (end := open_end(ends, always)):
        status, reason = "not_identified", end
    found = (None, None) if status == "not_identified" else (float(values[0]), ends)
    if rejected and status != "not_identified":
        status, reason = "not_identified", f"{rejected}; {reason}" if reason else rejected
    identified = found if status == "identified" else (None, None)
    names = (quantity, "ci95", "estimate", "estimate_ci95", "status", "reason")
    return dict(zip(names, (*identified, *found, status, reason), strict=True))


def _size_ratio(at: _Comparison) -> tuple[SizeRatio, ComputeGain | None]:
    n_params = size_at(at.curve, at.loss, at.data[0])
    with np.errstate(divide="ignore"):
        ratio = at.size / n_params
    verdict = _verdict_on_size(at, float(n_params[0]))
    judged = ratio_fields("ratio", ratio, *verdict, "at any size", at.rejected_because)
    known = judged["estimate"] is not None
    found = SizeRatio(
        architecture=at.architecture,
        iterations=at.iterations,
        tokens=at.tokens,
        reference_n_params=at.size,
        loss=float(at.loss[0]),
        n_params=float(n_params[0]) if known else None,
        **judged,
    )
    return found, _compute_gain(at, found, n_params) if known else None


def _compute_gain(at: _Comparison, ratio: SizeRatio, n_params: Array) -> ComputeGain | None:
    reference = _flops(at.base, np.full(len(n_params), at.size), at.iterations, at.tokens)
    own = _flops(at.curve, n_params, at.iterations, at.tokens)
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


def _verdict_on_size(at: _Comparison, n_params: float) -> tuple[Verdict, str]:
    name, loss = wording.architecture(at.architecture), float(at.loss[0])
    arms = ((name, at.curve, at.data[0]), ("the reference", at.base, at.data[1]))
    for arm, curve, data in arms:
        smallest, largest = curve.loss(curve.sizes[0], data)[0], curve.loss(curve.sizes[-1], data)[0]
        if smallest < largest * (1 + FLATTEST):
            return "not_identified", f"the fitted loss of {arm} does not fall with size"
    if at.unidentified_because:
        return "not_identified", at.unidentified_because
    if not np.isfinite(n_params):
        reason = f"no size of {name} reaches a loss of {loss:.4f} at this budget by its fitted law"
        return "not_identified", reason
    if n_params <= 1.0:
        return "not_identified", f"every size of {name} is below a loss of {loss:.4f} by its fitted law"
    beyond = []
    smallest, largest = at.curve.sizes[0], at.curve.sizes[-1]
    if not smallest <= n_params <= largest:
        factor = max(smallest / n_params, n_params / largest)
        side = "below the smallest" if n_params < smallest else "above the largest"
        beyond.append(f"the equal size lies {wording.times(float(factor))} times {side} trained size")
    for arm, curve, data in arms:
        least, most = curve.trained_data
        if not least / SAME_DATA <= data <= most * SAME_DATA:
            factor = max(least / data, data / most)
            side = "below the shortest" if data < least else "above the longest"
            beyond.append(f"the budget lies {wording.times(factor)} times {side} of {arm}")
    return ("extrapolated" if beyond else "identified"), " and ".join(beyond)


def _flops(curve: Curve, n_params: Array, iterations: float | None, tokens: float) -> Array | None:
    """Return the training FLOPs of sizes; None if the points have none, or one size only."""
    if not curve.counts_flops or len(curve.sizes) < 2:
        return None
    own_tokens = tokens if iterations is None else curve.tokens(iterations)
    out: Array = np.exp(curve.log_rate(np.log(np.clip(n_params, 1.0, 1e18)))) * own_tokens
    return out


def _token_gain(at: _Comparison) -> TokenGain:
    data = data_at(at.curve, at.loss, at.size)
    tokens = data * at.curve.tokens_a_unit
    with np.errstate(divide="ignore"):
        gain = at.tokens / tokens
    verdict = _verdict_on_tokens(at, float(data[0]), float(tokens[0]))
    judged = ratio_fields("gain", gain, *verdict, "with any training", at.rejected_because)
    return TokenGain(
        architecture=at.architecture,
        iterations=at.iterations,
        reference_tokens=at.tokens,
        reference_n_params=at.size,
        loss=float(at.loss[0]),
        tokens=None if judged["estimate"] is None else float(tokens[0]),
        **judged,
    )


def _verdict_on_tokens(at: _Comparison, data: float, tokens: float) -> tuple[Verdict, str]:
    name, curve = wording.architecture(at.architecture), at.curve
    trained = curve.frame["tokens"].to_numpy(dtype=np.float64)
    if at.unidentified_because:
        return "not_identified", at.unidentified_because
    first, last = (
        curve.loss(at.size, end / curve.tokens_a_unit)[0] for end in (trained.min(), trained.max())
    )
    if first < last * (1 + FLATTEST):
        return "not_identified", f"the fitted loss of {name} does not fall with training"
    if not np.isfinite(data) or data <= 1.0:
        return "not_identified", f"no amount of training gives {name} a loss of {at.loss[0]:.4f} there"
    if not curve.sizes[0] <= at.size <= curve.sizes[-1]:
        return "extrapolated", f"the reference is larger or smaller than all trained sizes of {name}"
    if not trained.min() <= tokens <= trained.max():
        factor = max(tokens / trained.max(), trained.min() / tokens)
        return "extrapolated", f"the equal budget lies {wording.times(factor)} times outside the trained ones"
    return "identified", ""
