"""The headline of a fit in sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING

from analysis.laws.catalogue import law_named
from analysis.text import architecture, between, budget, human, number, saving, times

if TYPE_CHECKING:
    from analysis.findings.equal_loss import SizeRatio
    from analysis.findings.results import FitDocument


def headlines(document: FitDocument) -> list[str]:
    """Write a sentence for each architecture: its size ratio at the largest reference and the longest budget."""
    comparison = document.comparison
    names = [name for name in document.architectures if name != comparison.reference]
    if not names:
        return [
            f"Only {architecture(comparison.reference)} was trained, so there is no size ratio; its law is "
            f"{law_in_numbers(document, comparison.reference)}."
        ]
    return [headline(document, name) for name in names]


def main_row(document: FitDocument, name: str) -> SizeRatio | None:
    """Return the size ratio of a headline, at the largest trained reference and the longest budget."""
    rows = [row for row in document.comparison.size_ratio if row.architecture == name]
    return max(rows, key=lambda row: (row.reference_n_params, row.tokens), default=None)


def ratio_rows(document: FitDocument) -> list[SizeRatio]:
    """Return the size ratios of a figure: those at the largest trained reference that have a number."""
    rows = document.comparison.size_ratio
    largest = max((row.reference_n_params for row in rows), default=0.0)
    return [row for row in rows if row.reference_n_params == largest and row.estimate is not None]


def headline(document: FitDocument, name: str) -> str:
    """Write one architecture's size ratio with its interval, or why there is none."""
    row = main_row(document, name)
    arm, base = architecture(name), architecture(document.comparison.reference)
    if row is None:
        return f"The size ratio of {arm} to {base} is not identified: this law has no term for size."
    at = budget(row.iterations, row.tokens)
    if row.estimate is None or row.n_params is None:
        return f"The size ratio of {arm} to {base} is not identified from these points: {row.reason}."
    others = _by_other_laws(document, row)
    if row.status == "not_identified":
        return (
            f"The size ratio of {arm} to {base} is not identified at {at}: {row.reason}. This law's own number is "
            f"{times(row.estimate)}, 95 % interval {between(row.estimate_ci95, 2)}.{others}"
        )
    caution = f"; this is an extrapolation, {row.reason}" if row.status == "extrapolated" else ""
    return (
        f"At {at}, {arm} reaches the loss of the {human(row.reference_n_params)}-parameter {base} "
        f"({row.loss:.3f} nats a token) with {saving(row.estimate)}: size ratio {times(row.estimate)}, "
        f"95 % interval {between(row.estimate_ci95, 2)}{caution}.{others}"
    )


def _by_other_laws(document: FitDocument, row: SizeRatio) -> str:
    """Write the size ratios of other admissible laws at a row's size and budget, or nothing if there are none."""
    at = (row.architecture, row.tokens, row.reference_n_params)
    said = [
        f"{times(one.ratio)} by {one.law}" + (f" {between(one.ci95, 2)}" if one.ci95 else "")
        for one in document.comparison.other_laws
        if (one.architecture, one.tokens, one.reference_n_params) == at and one.ratio is not None
    ]
    return f" Other laws that the points do not reject give {' and '.join(said)}." if said else ""


def law_in_numbers(document: FitDocument, name: str) -> str:
    """Write the fitted law with its numbers in place of its letters, or both if it is no sum of powers."""
    params = document.architectures[name].params
    law = law_named(document.law)
    if set(law.names) != {"E", *law.scaled, *(exponent for _, exponent in law.scaled.values())}:
        values = ", ".join(f"{one} = {number(value)}" for one, value in params.items())
        return f"{law.formula} with {values}"
    text = number(params["E"])
    symbols = {one.column: one.symbol for one in law.inputs}
    for coefficient, (column, exponent) in law.scaled.items():
        text += f" + {number(params[coefficient])}/{symbols[column]}^{params[exponent]:.3f}"
    return text
