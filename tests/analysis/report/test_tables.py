"""The tables that `fit` prints show the names of a foreign table as plain text."""

from __future__ import annotations

import io

from rich.console import Console

from analysis.findings.document import fit_points
from analysis.report.tables import print_fit
from tests.analysis.conftest import checked
from tests.analysis.synthetic import SyntheticStudy


def test_names_that_look_like_markup_are_printed_as_they_are() -> None:
    table = SyntheticStudy().table(0).replace({"architecture": {"prefix_simba": "[/b]mine[red]"}})
    points = checked(table)
    said = io.StringIO()
    print_fit(Console(file=said, width=200, markup=False), points, fit_points(points, resamples=100))
    assert "[/b]mine[red]" in said.getvalue()
