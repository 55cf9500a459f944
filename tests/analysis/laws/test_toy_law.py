"""A law with an input of its own is one file and one call: its column is read, checked, fitted, held and reported."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.errors import InputError
from analysis.findings.comparison import fit_all
from analysis.findings.document import fit_points
from analysis.findings.notes import design_notes
from analysis.findings.results import FitDocument
from analysis.laws.catalogue import LAWS, register
from analysis.laws.law import SIZE, TOKENS, Input, Law, power_law
from analysis.points.table import CheckedPoints, check_points, read_table
from tests.analysis.conftest import checked
from tests.analysis.report.test_report import page_of
from tests.analysis.synthetic import TRANSFORMER, TRUE_RATIO, SyntheticStudy, loss_by

# The whole of the law, as its file would have it.
WIDTH = Input("width_ratio", "w", ceiling=1e4)
TOY = power_law(
    "toy", "L = E + A/N^α + B/D^β + C/w^γ", ("A", SIZE, "alpha"), ("B", TOKENS, "beta"), ("C", WIDTH, "gamma")
)

C, GAMMA = 0.8, 0.7


@pytest.fixture(scope="module", autouse=True)
def law() -> Iterator[Law]:
    yield register(TOY)
    del LAWS["toy"]


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    """Series of three widths a size, whose loss falls with their width too."""
    table = SyntheticStudy(seeds=(3, 3, 3, 3), cluster_noise=1e-5, row_noise=1e-5).table(0)
    width = np.array([16.0, 64.0, 256.0])[table["seed"]]
    return table.assign(width_ratio=width, loss=table["loss"] + C / width**GAMMA)


@pytest.fixture(scope="module")
def points(table: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> CheckedPoints:
    """The same as a user's file, with a name of its own for the column."""
    path = tmp_path_factory.mktemp("toy") / "points.csv"
    table.rename(columns={"width_ratio": "aspect"}).to_csv(path, index=False)
    return check_points(read_table(path, {"width_ratio": "aspect"}), TOY)


@pytest.fixture(scope="module")
def document(points: CheckedPoints) -> FitDocument:
    return fit_points(points, law="toy", resamples=100)


def test_its_parameters_are_recovered_and_have_intervals(document: FitDocument) -> None:
    for name, params in SyntheticStudy().laws.items():
        fit = document.architectures[name]
        assert fit.status == "converged"
        assert fit.params == pytest.approx(params | {"C": C, "gamma": GAMMA}, rel=0.02)
        assert set(fit.ci95) == set(fit.profile) == set(TOY.names)


def test_size_and_data_are_compared_with_its_input_held(document: FitDocument) -> None:
    for row in document.comparison.size_ratio:
        assert row.estimate == pytest.approx(TRUE_RATIO, rel=0.02)
    assert document.comparison.token_gain
    (large, _) = document.architectures["cross_transformer"].predictions
    assert large.loss == pytest.approx(loss_by(TRANSFORMER, 6e6, 25.6e6) + C / 64**GAMMA, rel=1e-3)


def test_it_is_reported(points: CheckedPoints, document: FitDocument, tmp_path: Path) -> None:
    html, page = page_of(points, document, tmp_path)
    assert "C/w<sup>γ</sup>" in html
    assert {figure["name"] for figure in page.figures} >= {"main", "loss_vs_budget", "residuals"}


def test_values_that_its_input_forbids_are_refused_with_their_row(table: pd.DataFrame) -> None:
    with pytest.raises(
        InputError, match=r"row 2, column width_ratio: 20000\.0 is out of range; .* at most 10000"
    ):
        checked(table.assign(width_ratio=2e4))
    with pytest.raises(InputError, match=r"row 2, column width_ratio: is empty; law toy needs it"):
        fit_points(checked(table.assign(width_ratio=table["width_ratio"].where(table.index > 0))), law="toy")


def test_too_few_values_of_its_input_are_noted(table: pd.DataFrame) -> None:
    points = checked(table[table["seed"] < 2])
    one, _ = fit_all(points.frames, TOY, 1e-3)
    texts = {note.text for note in design_notes(one, points.of(one.architecture))}
    assert "2 values of width_ratio cannot identify C and gamma; train 3." in texts


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="toy is registered already"):
        register(TOY)
