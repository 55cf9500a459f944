"""Synthetic studies, read and fitted as a user's would be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis.findings.comparison import Comparison, FittedArchitecture, comparison_of, fit_all
from analysis.findings.curve import Curve
from analysis.findings.document import fit_points
from analysis.findings.results import FitDocument
from analysis.fitting.bootstrap import Fitted, noisy_losses, resample
from analysis.laws.catalogue import CHINCHILLA
from analysis.laws.law import Array, Law
from analysis.points.table import CheckedPoints, build_frame, check_points
from tests.analysis.simulators import Campaign
from tests.analysis.synthetic import QUIET, WIDE, SyntheticStudy


def checked(table: pd.DataFrame, law: Law | None = None, *, annealed: bool = True) -> CheckedPoints:
    rows = [(number + 2, row) for number, row in enumerate(table.itertuples(index=False, name=None))]
    return check_points(build_frame(list(table.columns), rows, "synthetic"), law, annealed=annealed)


def fit(table: pd.DataFrame | SyntheticStudy, resamples: int = 100, **options: Any) -> FitDocument:
    """Fit a table of points, or those of a study."""
    table = table.table(0) if isinstance(table, SyntheticStudy) else table
    return fit_points(checked(table), resamples=resamples, **options)


def joined(
    points: CheckedPoints, resamples: int = 100, law: Law = CHINCHILLA
) -> dict[str, FittedArchitecture]:
    """Return the fits that `fit` compares, without the profiles that take most of its time."""
    fits = fit_all(points.frames, law)
    drawn = resample(fits, resamples, 0)
    return {one.architecture: FittedArchitecture.of(one, points, drawn) for one in fits}


def noisy(fits: Mapping[str, FittedArchitecture], resamples: int) -> dict[str, Array]:
    """Return each architecture's resampled log losses (resamples, points)."""
    drawn = resample([one.fit for one in fits.values()], resamples, 0)
    return {name: noisy_losses(one.fit, drawn, resamples) for name, one in fits.items()}


def compared(table: pd.DataFrame | SyntheticStudy, resamples: int = 100, law: Law = CHINCHILLA) -> Comparison:
    """Return the comparison that `fit` has with the transformer."""
    points = checked(table.table(0) if isinstance(table, SyntheticStudy) else table)
    fits = joined(points, resamples, law)
    paired = len({frozenset(one.fit.keys) for one in fits.values()}) == 1
    return comparison_of(fits, "cross_transformer", None, paired=paired)[0]


def true_curves(campaign: Campaign, table: pd.DataFrame | None = None, draws: int = 0) -> dict[str, Curve]:
    """Return the true laws of a simulated campaign with its points, as if they had been fitted without error."""
    frames = checked(campaign.table(0) if table is None else table).frames
    params = {name: [law.E, law.A, law.B, law.alpha, law.beta] for name, law in campaign.laws.items()}
    return {
        name: Curve(CHINCHILLA, np.tile(params[name], (1 + draws, 1)), frame)
        for name, frame in frames.items()
    }


def fitted(points: CheckedPoints, name: str = "prefix_simba", delta: float | None = None) -> Fitted:
    """Fit the law to one architecture alone."""
    (one,) = fit_all({name: points.of(name)}, CHINCHILLA, delta)
    return one


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
def quiet() -> FitDocument:
    """A fit of points that have next to no noise."""
    return fit(QUIET)
