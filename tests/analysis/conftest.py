"""Synthetic studies, read and fitted as a user's would be."""

from __future__ import annotations

import pandas as pd
import pytest

from analysis.document import FitDocument, fit_points
from analysis.points import CheckedPoints, build_frame, check_points
from tests.analysis.synthetic import SyntheticStudy


def checked(table: pd.DataFrame) -> CheckedPoints:
    rows = [(number + 2, row) for number, row in enumerate(table.itertuples(index=False, name=None))]
    return check_points(build_frame(list(table.columns), rows, "synthetic"))


@pytest.fixture(scope="session")
def points() -> CheckedPoints:
    """18 points in 6 series for each of two architectures, as the demo has."""
    return checked(SyntheticStudy().table(0))


@pytest.fixture(scope="session")
def document(points: CheckedPoints) -> FitDocument:
    """Those points fitted with 300 resamples."""
    return fit_points(points, resamples=300)
