"""Synthetic studies, read and fitted as a user's would be."""

from __future__ import annotations

import pandas as pd
import pytest

from analysis.findings.document import fit_points
from analysis.findings.results import FitDocument
from analysis.fitting.bootstrap import Fitted, cluster_keys
from analysis.fitting.solver import Problem, fit_law
from analysis.laws.catalogue import CHINCHILLA
from analysis.points.table import CheckedPoints, build_frame, check_points
from tests.analysis.synthetic import SyntheticStudy


def checked(table: pd.DataFrame) -> CheckedPoints:
    rows = [(number + 2, row) for number, row in enumerate(table.itertuples(index=False, name=None))]
    return check_points(build_frame(list(table.columns), rows, "synthetic"))


def fitted(points: CheckedPoints, name: str) -> Fitted:
    frame = points.of(name)
    size = frame["n_params"].to_numpy(dtype=float)
    problem = Problem.of(
        CHINCHILLA, frame[["n_params", "tokens"]].to_numpy(dtype=float), frame["loss"].to_numpy(), 1e-3
    )
    cluster, keys = cluster_keys(size, frame["seed"].to_numpy(dtype=float), list(frame["cluster"]))
    return Fitted(name, problem, fit_law(problem), cluster, keys, size)


@pytest.fixture(scope="session")
def points() -> CheckedPoints:
    """18 points in 6 series for each of two architectures, as the demo has."""
    return checked(SyntheticStudy().table(0))


@pytest.fixture(scope="session")
def document(points: CheckedPoints) -> FitDocument:
    """Those points fitted with 300 resamples."""
    return fit_points(points, resamples=300)
