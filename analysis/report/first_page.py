"""The first lines of a report: the answer, its support, what it rests on, what was left out.

Each part returns its own lines and is silent where it has nothing to say. Together they are ten at most.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from analysis import text as wording
from analysis.points.checks import data_column
from analysis.report.headlines import headlines, main_row
from analysis.report.levels import levels

if TYPE_CHECKING:
    from analysis.findings.results import FitDocument
    from analysis.points.table import CheckedPoints

MOST = 10
SENTENCES = 3
"""Most architectures that have a sentence each; more share a line for each status."""
LIMITS = {
    "no_size_effect": "no effect of size",
    "law_rejected": "the residuals reject the law",
    "law_dependent": "another law gives another ratio",
    "structured_residuals": "a pattern in the residuals",
    "model_free_disagrees": "the losses themselves give another ratio than the law",
    "collinear": "size and data vary together",
    "too_few_sizes": "too few sizes",
    "too_few_budgets": "too few budgets",
    "too_few_points": "too few points",
    "bound_hit": "a parameter on its bound",
    "convention_sensitive": "another way of counting changes the conclusion",
    "outlier_points": "outliers among the points",
    "diverged_points": "runs that diverged have no weight",
    "arms_differ": "the architectures differ in a setting",
    "codebooks_rank_otherwise": "a codebook ranks the architectures otherwise",
    "heldout_underdetermined": "too few points to test a prediction",
}
"""Notes that limit the answer itself, by code, in words."""


@dataclass(frozen=True)
class Line:
    """A line of the first page under a heading of a word or two."""

    about: str
    text: str


def first_page(document: FitDocument, points: CheckedPoints) -> list[Line]:
    """Return at most ten lines: answer, support, law, intervals, left out, limits."""
    rest = [
        *_support(document, points),
        *_law(document),
        *_intervals(document),
        *_left_out(points),
        *_limits(document),
    ]
    return [*_answer(document)[: MOST - len(rest)], *rest]


def _answer(document: FitDocument) -> list[Line]:
    others = [name for name in document.architectures if name != document.comparison.reference]
    if len(others) <= SENTENCES:
        return [Line("Answer", sentence) for sentence in headlines(document)]
    return _together(document, others)


def _together(document: FitDocument, names: list[str]) -> list[Line]:
    """Write the size ratios of many architectures as a line for each place of comparison and status."""
    base = wording.architecture(document.comparison.reference)
    found: dict[tuple[str, str], list[str]] = {}
    for name in names:
        row, arm = main_row(document, name), wording.architecture(name)
        if row is None or row.estimate is None:
            found.setdefault(("not identified", ""), []).append(arm)
            continue
        size = wording.human(row.reference_n_params)
        at = f"{wording.budget(row.iterations, row.tokens)}, against the {size}-parameter {base}"
        ratio = f"{arm} {wording.times(row.estimate)} {wording.between(row.estimate_ci95, 2)}"
        found.setdefault((row.status, at), []).append(ratio)
    lines = []
    for status in ("identified", "extrapolated", "not identified"):
        for (own, at), arms in found.items():
            if own == status:
                what = (
                    "The size ratio is not identified"
                    if status == "not identified"
                    else f"Size ratio after {at}"
                )
                beyond = ", outside what was trained" if status == "extrapolated" else ""
                to = f" to {base}" if status == "not identified" else ""
                lines.append(Line("Answer", f"{what}{to}{beyond}: {'; '.join(arms)}."))
    return lines


def _support(document: FitDocument, points: CheckedPoints) -> list[Line]:
    """Say what was trained, and how many of the size ratios lie inside it."""
    frame, unit = points.frame, data_column(points.frame)
    sizes = [level.at for level in levels(frame["n_params"].to_numpy(dtype=np.float64), None)]
    budgets = [level.at for level in levels(frame[unit].to_numpy(dtype=np.float64), None)]
    count = (lambda value: f"{value:,.0f}") if unit == "iterations" else wording.human
    text = (
        f"{wording.counted(len(frame), 'point')} of {wording.counted(len(document.architectures), 'architecture')}: "
        f"{_range([wording.human(size) for size in sizes], 'sizes')} parameters, "
        f"{_range([count(budget) for budget in budgets], 'budgets')} {unit}."
    )
    rows = document.comparison.size_ratio
    if rows:
        inside = sum(row.status == "identified" for row in rows)
        text += f" {inside} of {wording.counted(len(rows), 'size ratio')} {'lies' if inside == 1 else 'lie'} inside."
    return [Line("Trained", text)]


def _law(document: FitDocument) -> list[Line]:
    """Say which law, delta and count of parameters the answer rests on, and how well it predicts what was left out."""
    choice = document.law_choice
    chosen = f", chosen among {len(choice.laws)} laws" if choice and len(choice.laws) > 1 else ""
    text = f"{document.formula}{chosen}; Huber's delta {document.huber_delta:.3g}"
    if document.comparison.size_ratio:
        text += f"; sizes counted by {document.comparison.n_convention}"
    lines = [Line("Law", f"{text}.")]
    errors = [
        split.rms_relative_error
        for fit in document.architectures.values()
        for split in (fit.heldout.largest_size, fit.heldout.longest_budget, fit.heldout.largest_compute)
        if split is not None
    ]
    if errors:
        text = f"up to {100 * max(errors):.2g} % (r.m.s.) at points left out of the fit; "
        inside = max(fit.heldout.in_sample_rms for fit in document.architectures.values())
        lines.append(Line("Errors", f"{text}{100 * inside:.2g} % at those it used."))
    return lines


def _intervals(document: FitDocument) -> list[Line]:
    how = document.resampling
    paired = (
        ", paired between architectures"
        if document.comparison.paired and len(document.architectures) > 1
        else ""
    )
    return [
        Line("Intervals", f"95 %, from {how.resamples:,} resamples: {wording.SCHEMES[how.scheme]}{paired}.")
    ]


def _left_out(points: CheckedPoints) -> list[Line]:
    counts = Counter(one.code.replace("_", " ") for one in points.exclusions)
    if not counts:
        return [Line("Left out", "no row of the table.")]
    kinds = ", ".join(f"{count:,} {code}" for code, count in counts.most_common(5))
    more = f" and {len(counts) - 5} further reasons" if len(counts) > 5 else ""
    return [Line("Left out", f"{wording.counted(len(points.exclusions), 'row')}: {kinds}{more}.")]


def _limits(document: FitDocument) -> list[Line]:
    """Name the notes that limit the answer, which the section Notes explains."""
    notes = [*document.notes, *(note for fit in document.architectures.values() for note in fit.notes)]
    found = [text for code, text in LIMITS.items() if any(note.code == code for note in notes)]
    return [Line("Limits", f"{'; '.join(found)} (see Notes).")] if found else []


def _range(written: list[str], what: str) -> str:
    return written[0] if len(written) == 1 else f"{len(written)} {what} from {written[0]} to {written[-1]}"
