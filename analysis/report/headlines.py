"""The headline of a fit in sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING

from analysis.findings.equal_loss import at_the_top, beyond_headline, headline_of
from analysis.laws.catalogue import law_named
from analysis.text import architecture, between, budget, human, number, saving, times

if TYPE_CHECKING:
    from analysis.findings.equal_loss import AtEqualLoss, SizeRatio
    from analysis.findings.results import FitDocument


def headlines(document: FitDocument) -> list[str]:
    """Write each architecture's size ratio in the supported region, then for each what lies beyond it."""
    comparison = document.comparison
    names = [name for name in document.architectures if name != comparison.reference]
    if not names:
        return [
            f"Only {architecture(comparison.reference)} was trained, so there is no size ratio; its law is "
            f"{law_in_numbers(document, comparison.reference)}."
        ]
    further = [beyond(document, name) for name in names]
    return [*(headline(document, name) for name in names), *(sentence for sentence in further if sentence)]


def main_row(document: FitDocument, name: str) -> SizeRatio | None:
    """Return the size ratio of a headline (`headline_of`)."""
    return headline_of(document.comparison.size_ratio, name)


def ratio_rows(document: FitDocument) -> list[SizeRatio]:
    """Return the size ratios of a figure: those at the reference size of each headline that have a number."""
    rows = document.comparison.size_ratio
    at = {
        name: row.reference_n_params for name in document.architectures if (row := main_row(document, name))
    }
    return [
        row for row in rows if row.reference_n_params == at[row.architecture] and row.estimate is not None
    ]


def headline(document: FitDocument, name: str) -> str:
    """Write one architecture's size ratio with its interval, or why there is none."""
    row = main_row(document, name)
    arm, base = architecture(name), architecture(document.comparison.reference)
    if row is None:
        return f"The size ratio of {arm} to {base} is not identified: this law has no term for size."
    if row.estimate is None:
        return f"The size ratio of {arm} to {base} is not identified from these points: {row.reason}."
    others = _by_other_laws(document, row)
    if row.status == "not_identified":
        free = at_the_top(
            [one for one in document.comparison.model_free if one.ratio and one.architecture == name]
        )
        own = f"the law alone would give {times(row.estimate)} {between(row.estimate_ci95, 2)}"
        if free is None:
            return f"The size ratio of {arm} to {base} is not identified: {row.reason} ({own}).{others}"
        assert free.ratio is not None
        return (
            f"A{_reached(free, arm, base, free.ratio)[1:]} {between(free.ci95, 2)} by the losses themselves, without a "
            f"law. No ratio by the law is identified: {row.reason} ({own}).{others}"
        )
    if row.status == "extrapolated":
        return (
            f"No size ratio of {arm} to {base} lies in the support of the runs: {_at_equal_loss(row, arm, base)}; "
            f"this is an extrapolation, {row.reason}."
        )
    open_ends = "" if row.ends_supported is not False else ", of which an end lies outside the trained runs"
    return f"A{_at_equal_loss(row, arm, base)[1:]}{open_ends}{_of_losses(document, row)}.{others}"


def _of_losses(document: FitDocument, row: SizeRatio) -> str:
    """Write the ratio of smoothed losses beside that of the law, if they give one there."""
    pairs = zip(document.comparison.size_ratio, document.comparison.model_free, strict=False)
    free = next((one for law, one in pairs if law is row and one.ratio is not None), None)
    if free is None or free.ratio is None:
        return ""
    differs = ", which differs by more than their intervals" if free.disagrees else ""
    return f"; without a law the losses give {times(free.ratio)} {between(free.ci95, 2)}{differs}"


def beyond(document: FitDocument, name: str) -> str:
    """Write the ratio of the laws at the reference's largest compute, if the headline stops short of it."""
    row = main_row(document, name)
    last = beyond_headline(document.comparison.size_ratio, row) if row is not None else None
    if last is None:
        return ""
    arm, base = architecture(name), architecture(document.comparison.reference)
    found = _at_equal_loss(last, arm, base)
    return f"Beyond the support of the runs, {found}; this is an extrapolation, {last.reason}."


def _at_equal_loss(row: SizeRatio, arm: str, base: str) -> str:
    assert row.estimate is not None
    return f"{_reached(row, arm, base, row.estimate)}, 95 % interval {between(row.estimate_ci95, 2)}"


def _reached(row: AtEqualLoss, arm: str, base: str, ratio: float) -> str:
    return (
        f"at {budget(row.iterations, row.tokens)}, {arm} reaches the loss of the "
        f"{human(row.reference_n_params)}-parameter {base} ({row.loss:.3f} nats a token) with {saving(ratio)}: "
        f"size ratio {times(ratio)}"
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
