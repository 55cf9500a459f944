"""How many times fewer tokens one architecture needs than another of the same size for the same loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from analysis import text as wording
from analysis.findings.curve import (
    FLATTEST,
    MANY_SIZES,
    SAME_BUDGET,
    Curve,
    Verdict,
    budgets_of,
    central,
    data_at,
    open_end,
    size_at,
)
from analysis.laws.law import Array


@dataclass(frozen=True)
class Equal:
    """One comparison at equal loss: the equal n_params, the ratio, its interval, whether it is identified."""

    architecture: str
    iterations: float | None
    tokens: float
    reference_n_params: float
    loss: float
    n_params: float | None
    ratio: float | None
    ci95: tuple[float, float] | None
    status: Verdict
    reason: str
    gain: float | None = None
    gain_ci95: tuple[float, float] | None = None
    reference_flops: float | None = None
    flops: float | None = None


def equal_loss(curves: Mapping[str, Curve], reference: str) -> list[Equal]:
    """Every architecture against the reference at each budget and reference size, the largest size first."""
    base = curves[reference]
    sizes = base.sizes[::-1] if len(base.sizes) <= MANY_SIZES else base.sizes[-1:]
    return [
        _compare(name, curve, base, iterations, tokens, float(size))
        for name, curve in curves.items()
        if name != reference
        for size in sizes
        for iterations, tokens in budgets_of(base, curves)
    ]


def at_the_top(curves: Mapping[str, Curve], reference: str) -> list[Equal]:
    """Every architecture against the reference at its largest size and longest budget, which headlines speak of."""
    base = curves[reference]
    iterations, tokens = max(budgets_of(base, curves), key=lambda budget: budget[1])
    return [
        _compare(name, curve, base, iterations, tokens, float(base.sizes[-1]))
        for name, curve in curves.items()
        if name != reference
    ]


def headline(rows: list[Equal], architecture: str) -> Equal | None:
    """The comparison at the largest trained reference and the longest budget."""
    own = [row for row in rows if row.architecture == architecture]
    return max(own, key=lambda row: (row.reference_n_params, row.tokens), default=None)


def _compare(
    name: str, curve: Curve, base: Curve, iterations: float | None, tokens: float, size: float
) -> Equal:
    loss = base.loss(size, base.budget(iterations, tokens))
    data = curve.budget(iterations, tokens)
    n_params = size_at(curve, loss, data)
    with np.errstate(divide="ignore"):
        ratio = size / n_params
    flat = [
        arm
        for arm, own, budget in (
            (name, curve, data),
            ("the reference", base, base.budget(iterations, tokens)),
        )
        if own.loss(own.sizes[0], budget)[0] < own.loss(own.sizes[-1], budget)[0] * (1 + FLATTEST)
    ]
    status, reason = _verdict(
        name, curve, base, float(n_params[0]), float(loss[0]), flat, (data, base.budget(iterations, tokens))
    )
    interval = central(ratio)
    end = open_end(interval, "at any size")
    if status != "not_identified" and end:
        status, reason = "not_identified", end
    if status == "not_identified":
        return Equal(name, iterations, tokens, size, float(loss[0]), None, None, None, status, reason)
    spent, own = (
        _flops(base, np.full(len(loss), size), iterations, tokens),
        _flops(curve, n_params, iterations, tokens),
    )
    gain = None if spent is None or own is None else spent / own
    return Equal(
        architecture=name,
        iterations=iterations,
        tokens=tokens,
        reference_n_params=size,
        loss=float(loss[0]),
        n_params=float(n_params[0]),
        ratio=float(ratio[0]),
        ci95=interval,
        status=status,
        reason=reason,
        gain=None if gain is None else float(gain[0]),
        gain_ci95=None if gain is None else central(gain),
        reference_flops=None if spent is None else float(spent[0]),
        flops=None if own is None else float(own[0]),
    )


def _verdict(
    name: str,
    curve: Curve,
    base: Curve,
    n_params: float,
    loss: float,
    flat: list[str],
    budgets: tuple[float, float],
) -> tuple[Verdict, str]:
    """What may be said of an equal size; `budgets` are the data inputs at which curve and base are read."""
    name = wording.architecture(name)
    if flat:
        return "not_identified", f"the fitted loss of {wording.architecture(flat[0])} does not fall with size"
    if curve.obstacle or base.obstacle:
        return "not_identified", curve.obstacle or base.obstacle
    if not np.isfinite(n_params):
        return (
            "not_identified",
            f"no size of {name} reaches a loss of {loss:.4f} at this budget by its fitted law",
        )
    if n_params <= 1.0:
        return "not_identified", f"every size of {name} would be below a loss of {loss:.4f} by its fitted law"
    sizes = curve.sizes
    beyond = []
    if n_params < sizes[0] or n_params > sizes[-1]:
        below = n_params < sizes[0]
        factor = sizes[0] / n_params if below else n_params / sizes[-1]
        side = "below the smallest" if below else "above the largest"
        beyond.append(f"the equal size lies {wording.times(float(factor))} times {side} trained size")
    for arm, own, budget in zip((name, "the reference"), (curve, base), budgets, strict=True):
        short, long = own.budgets
        if not short / SAME_BUDGET <= budget <= long * SAME_BUDGET:
            factor = max(short / budget, budget / long)
            side = "below the shortest" if budget < short else "above the longest"
            beyond.append(f"the budget lies {wording.times(factor)} times {side} of {arm}")
    return ("extrapolated" if beyond else "identified"), " and ".join(beyond)


def _flops(curve: Curve, n_params: Array, iterations: float | None, tokens: float) -> Array | None:
    """Training FLOPs of sizes at a budget: FLOPs a token of the trained sizes, linear between them in logarithms."""
    frame = curve.frame
    if not frame["flops"].notna().all():
        return None
    rate = (frame["flops"] / frame["tokens"]).groupby(frame["n_params"]).median().sort_index()
    sizes, rates = np.log(rate.index.to_numpy(dtype=np.float64)), np.log(rate.to_numpy(dtype=np.float64))
    if len(sizes) < 2:
        return None
    at = np.log(np.clip(n_params, 1.0, 1e18))
    slope = np.diff(rates) / np.diff(sizes)
    piece = np.clip(np.searchsorted(sizes, at) - 1, 0, len(slope) - 1)
    own_tokens = tokens if iterations is None else curve.tokens(iterations)
    out: Array = np.exp(rates[piece] + slope[piece] * (at - sizes[piece])) * own_tokens
    return out


@dataclass(frozen=True)
class TokenGain:
    """Tokens of the reference over those of the architecture at equal loss and equal size; null unless identified.

    D' solves L_arch(N_ref, D') = L_ref(N_ref, D); the gain is D / D'. `estimate` is what the laws give where D' or
    N_ref lies outside what the architecture was trained on.
    """

    architecture: str
    iterations: float | None
    reference_tokens: float
    reference_n_params: float
    loss: float
    tokens: float | None
    gain: float | None
    ci95: tuple[float, float] | None
    estimate: float | None
    estimate_ci95: tuple[float, float] | None
    status: Verdict
    reason: str


def token_gains(curves: Mapping[str, Curve], reference: str) -> list[TokenGain]:
    """Every architecture against the reference at each of its budgets, at the largest trained reference size."""
    base = curves[reference]
    return [
        _token_gain(name, curve, base, iterations, tokens, float(base.sizes[-1]))
        for name, curve in curves.items()
        if name != reference
        for iterations, tokens in budgets_of(base, curves)
    ]


def _token_gain(
    name: str, curve: Curve, base: Curve, iterations: float | None, tokens: float, size: float
) -> TokenGain:
    loss = base.loss(size, base.budget(iterations, tokens))
    data = data_at(curve, loss, size)
    rate = curve.tokens(1.0) if "iterations" in curve.law.inputs else 1.0
    spent = data * rate
    with np.errstate(divide="ignore"):
        gain = tokens / spent
    own = curve.frame["tokens"].to_numpy(dtype=np.float64)
    flat = curve.loss(size, own.min() / rate)[0] < curve.loss(size, own.max() / rate)[0] * (1 + FLATTEST)
    arm, interval = wording.architecture(name), central(gain)
    status: Verdict = "identified"
    reason = ""
    if curve.obstacle or base.obstacle:
        status, reason = "not_identified", curve.obstacle or base.obstacle
    elif flat:
        status, reason = "not_identified", f"the fitted loss of {arm} does not fall with training"
    elif not np.isfinite(data[0]) or data[0] <= 1.0:
        status, reason = (
            "not_identified",
            f"no amount of training gives {arm} a loss of {float(loss[0]):.4f} there",
        )
    elif end := open_end(interval, "with any training"):
        status, reason = "not_identified", end
    elif not curve.sizes[0] <= size <= curve.sizes[-1]:
        status, reason = "extrapolated", f"{arm} was not trained as large, or as small, as the reference"
    elif not own.min() <= spent[0] <= own.max():
        beyond = max(float(spent[0]) / own.max(), own.min() / float(spent[0]))
        status, reason = (
            "extrapolated",
            f"the equal training lies {wording.times(beyond)} times outside the trained",
        )
    known, sure = status != "not_identified", status == "identified"
    return TokenGain(
        architecture=name,
        iterations=iterations,
        reference_tokens=tokens,
        reference_n_params=size,
        loss=float(loss[0]),
        tokens=float(spent[0]) if known else None,
        gain=float(gain[0]) if sure else None,
        ci95=interval if sure else None,
        estimate=float(gain[0]) if known else None,
        estimate_ci95=interval if known else None,
        status=status,
        reason=reason,
    )
