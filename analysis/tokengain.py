"""How many times fewer tokens one architecture needs than another of the same size for the same loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from analysis import wording
from analysis.compare import FLATTEST, Curve, Verdict, budgets_of, central, data_at, open_end


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
