"""Numbers and findings as a reader meets them: 3.2M parameters, 5.8 times fewer, not identified and why."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from analysis.results import FitDocument, SizeRatio

UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
NAMES = {
    "prefix_mamba": "Prefix Mamba",
    "prefix_simba": "Prefix SiMBA",
    "cross_simba": "Cross SiMBA",
    "cross_transformer": "Cross Transformer",
}


def architecture(name: str) -> str:
    """The architecture's written name."""
    return NAMES.get(name, name)


def human(value: float, digits: int = 3) -> str:
    """A count with its unit: 3.16M, 412k, 1.2B; plain digits below a thousand."""
    for scale, unit in UNITS:
        if abs(value) >= scale * (1 - 0.5 * 10**-digits):
            return f"{_significant(value / scale, digits)}{unit}"
    return _significant(value, digits)


def number(value: float, digits: int = 3) -> str:
    """A number to so many significant digits, with thousands separators and in powers of ten from a million on."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    if abs(value) >= 1e6 or abs(value) < 1e-4:
        exponent = math.floor(math.log10(abs(value)))
        superscript = str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        return f"{value / 10**exponent:.{digits - 1}f} × 10{superscript}"
    return _significant(value, digits)


def times(value: float) -> str:
    """A ratio: 5.8, 12, 0.53."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}" if value < 1 else f"{value:.1f}"


def ratio_in_words(ratio: float) -> str:
    """A size ratio as what it means."""
    return (
        f"{times(ratio)} times fewer parameters"
        if ratio >= 1
        else f"{times(1 / ratio)} times more parameters"
    )


def saving(ratio: float) -> str:
    """A size ratio beside its arrow: 4.8× fewer parameters."""
    return f"{times(max(ratio, 1 / ratio))}× {'fewer' if ratio >= 1 else 'more'} parameters"


def between(ends: tuple[float, float] | None, digits: int = 3) -> str:
    """An interval in brackets; an end beyond any real ratio is written as unbounded."""
    if ends is None:
        return "no interval"
    low, high = (number(end, digits) if abs(end) < 1e15 else "unbounded" for end in ends)
    return f"[{low}, {high}]"


def percent(value: float) -> str:
    """A signed percentage of a relative error."""
    return f"{100 * value:+.2f} %".replace("-", "−")


def budget(iterations: float | None, tokens: float) -> str:
    """A budget in words."""
    return f"{human(tokens)} tokens" if iterations is None else f"{iterations:,.0f} iterations"


def budget_of(unit: str, value: float) -> str:
    """A budget in words, from the column it stands in."""
    return f"{value:,.0f} iterations" if unit == "iterations" else f"{human(value)} tokens"


def headlines(document: FitDocument) -> list[str]:
    """One sentence an architecture: its size ratio at the largest trained reference and the longest budget."""
    comparison = document.comparison
    names = [name for name in document.architectures if name != comparison.reference]
    if not names:
        return [
            f"Only {architecture(comparison.reference)} was trained, so there is no size ratio; its law is "
            f"{law_in_numbers(document, comparison.reference)}."
        ]
    return [headline(document, name) for name in names]


def main_row(document: FitDocument, name: str) -> SizeRatio | None:
    """The comparison a headline speaks of: largest trained reference, longest budget."""
    rows = [row for row in document.comparison.size_ratio if row.architecture == name]
    return max(rows, key=lambda row: (row.reference_n_params, row.tokens), default=None)


def ratio_rows(document: FitDocument) -> list[SizeRatio]:
    """What a figure of size ratios shows: those at the largest trained reference that have a number."""
    rows = document.comparison.size_ratio
    largest = max((row.reference_n_params for row in rows), default=0.0)
    return [row for row in rows if row.reference_n_params == largest and row.estimate is not None]


def headline(document: FitDocument, name: str) -> str:
    """One architecture's size ratio with its interval, or why there is none."""
    row = main_row(document, name)
    arm, base = architecture(name), architecture(document.comparison.reference)
    if row is None:
        return f"The size ratio of {arm} to {base} is not identified: this law says nothing of size."
    at = budget(row.iterations, row.tokens)
    if row.estimate is None or row.n_params is None:
        return f"The size ratio of {arm} to {base} is not identified from these points: {row.reason}."
    caution = f"; this is an extrapolation, {row.reason}" if row.status == "extrapolated" else ""
    return (
        f"At {at}, {arm} reaches the loss of the {human(row.reference_n_params)}-parameter {base} "
        f"({row.loss:.3f} nats a token) with {ratio_in_words(row.estimate)}: size ratio {times(row.estimate)}, "
        f"95 % interval {between(row.estimate_ci95, 2)}{caution}."
    )


def law_in_numbers(document: FitDocument, name: str) -> str:
    """The fitted law with its numbers in place of its letters."""
    params = document.architectures[name].params
    text = number(params["E"])
    for coefficient, symbol, exponent in (("A", "N", "alpha"), ("B", document.formula_data_symbol, "beta")):
        if coefficient in params:
            text += f" + {number(params[coefficient])}/{symbol}^{params[exponent]:.3f}"
    return text


def _significant(value: float, digits: int) -> str:
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
