"""Synthetic studies, read and fitted as a user's would be."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from analysis.findings.document import fit_points
from analysis.findings.results import FitDocument
from analysis.fitting.bootstrap import Fitted, cluster_keys
from analysis.fitting.solver import Problem, fit_law
from analysis.laws.catalogue import CHINCHILLA
from analysis.laws.law import Law
from analysis.points.table import CheckedPoints, build_frame, check_points
from tests.analysis.synthetic import QUIET, WIDE, SyntheticStudy


def checked(table: pd.DataFrame, law: Law | None = None, *, annealed: bool = True) -> CheckedPoints:
    rows = [(number + 2, row) for number, row in enumerate(table.itertuples(index=False, name=None))]
    return check_points(build_frame(list(table.columns), rows, "synthetic"), law, annealed=annealed)


def fit(table: pd.DataFrame | SyntheticStudy, resamples: int = 100, **options: Any) -> FitDocument:
    """Fit a table of points, or those of a study."""
    table = table.table(0) if isinstance(table, SyntheticStudy) else table
    return fit_points(checked(table), resamples=resamples, **options)


def fitted(points: CheckedPoints, name: str) -> Fitted:
    frame = points.of(name)
    size = frame["n_params"].to_numpy(dtype=float)
    problem = Problem.of(CHINCHILLA, CHINCHILLA.x(frame), frame["loss"].to_numpy(), 1e-3)
    cluster, keys = cluster_keys(size, frame["seed"].to_numpy(dtype=float), list(frame["cluster"]))
    return Fitted(name, problem, fit_law(problem), cluster, keys, size)


def note_codes(document: FitDocument, name: str = "prefix_simba") -> set[str]:
    """Codes of the notes on the whole and on one architecture."""
    return {note.code for note in (*document.notes, *document.architectures[name].notes)}


@pytest.fixture(scope="session")
def points() -> CheckedPoints:
    """18 points in 6 series for each of two architectures, as the demo has."""
    return checked(SyntheticStudy().table(0))


@pytest.fixture(scope="session")
def document(points: CheckedPoints) -> FitDocument:
    """Those points fitted with 300 resamples."""
    return fit_points(points, resamples=300)


@pytest.fixture(scope="session")
def wide() -> CheckedPoints:
    """48 points in 12 series of six sizes for each of two architectures."""
    return checked(WIDE.table(0))


@pytest.fixture(scope="session")
def wide_document(wide: CheckedPoints) -> FitDocument:
    """Those points fitted with 100 resamples."""
    return fit_points(wide, resamples=100)


@pytest.fixture(scope="session")
def quiet() -> FitDocument:
    """A fit of points that have next to no noise."""
    return fit(QUIET)
