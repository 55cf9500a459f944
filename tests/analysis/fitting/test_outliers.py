"""A point far off its law is named, left out only on request, and then listed."""

from __future__ import annotations

import pandas as pd
import pytest

from analysis.findings.document import drop_outliers, fit_points
from tests.analysis.conftest import checked, fit
from tests.analysis.synthetic import SyntheticStudy

RUN = "cross_transformer-100000-1-400"


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    """A study in which one run went astray."""
    table = SyntheticStudy().table(0)
    return table.assign(loss=table["loss"].where(table["run_id"] != RUN, table["loss"] * 1.2))


def test_an_outlier_is_named_with_its_rule_and_stays_in_the_fit(table: pd.DataFrame) -> None:
    document = fit(table)
    fitted = document.architectures["cross_transformer"]
    (note,) = [note for note in fitted.notes if note.code == "outliers"]
    assert RUN in note.text
    assert "10 robust standard deviations" in note.text
    assert fitted.n_points == 18
    assert "outliers" not in {note.code for note in document.architectures["prefix_simba"].notes}


def test_noise_of_the_usual_size_makes_no_outliers() -> None:
    for seed in range(10):
        assert drop_outliers(checked(SyntheticStudy().table(seed))).exclusions == ()


def test_on_request_an_outlier_is_left_out_and_listed(table: pd.DataFrame) -> None:
    points = drop_outliers(checked(table))
    (gone,) = points.exclusions
    assert (gone.run_id, gone.code) == (RUN, "outlier")
    assert "median absolute residual" in gone.reason
    document = fit_points(points, resamples=100)
    assert document.architectures == fit(table[table["run_id"] != RUN]).architectures
    assert [note.text for note in document.notes if note.code == "outlier_points"] == [
        "1 row far off the law of the others, left out of the fit as requested."
    ]
