"""The first page: at most ten lines, each of which the fit or the table holds."""

from __future__ import annotations

from dataclasses import replace

from analysis.findings.results import FitDocument
from analysis.points.table import CheckedPoints, Exclusion
from analysis.report.first_page import MOST, first_page
from analysis.report.headlines import headlines
from analysis.text import architecture
from tests.analysis.conftest import checked, fit
from tests.analysis.synthetic import of_many


def lines(document: FitDocument, points: CheckedPoints) -> dict[str, str]:
    return {line.about: line.text for line in first_page(document, points)}


def test_it_has_the_answer_its_support_law_and_what_was_left_out(
    points: CheckedPoints, document: FitDocument
) -> None:
    found = lines(document, points)
    assert found["Answer"] == headlines(document)[0]
    assert found["Trained"].startswith(
        "36 points of 2 architectures: 4 sizes from 100k to 3M parameters, 3 budgets from 400 to 1,600 iterations."
    )
    inside = sum(row.status == "identified" for row in document.comparison.size_ratio)
    assert f"{inside} of {len(document.comparison.size_ratio)} size ratios" in found["Trained"]
    assert document.formula in found["Law"]
    assert f"delta {document.huber_delta:.3g}" in found["Law"]
    assert "n_params" in found["Law"]
    assert "300 resamples" in found["Intervals"]
    assert found["Left out"] == "no row of the table."


def test_rows_left_out_are_counted_by_reason(points: CheckedPoints, document: FitDocument) -> None:
    one = Exclusion(2, "r", "a", 1e6, 1e9, 3.0, "unannealed", "why")
    aside = replace(points, exclusions=(one, one, replace(one, code="too_few")))
    assert lines(document, aside)["Left out"] == "3 rows: 2 unannealed, 1 too few."


def test_of_many_architectures_it_has_ten_lines_at_most_and_names_all() -> None:
    table = of_many(5, sizes=(1e5, 2e5, 4e5), iterations=(200, 400, 800)).table(0)
    points = checked(table)
    document = fit(table)
    found = first_page(document, points)
    assert len(found) <= MOST
    said = " ".join(line.text for line in found)
    assert [name for name in points.architectures if architecture(name) not in said] == []
