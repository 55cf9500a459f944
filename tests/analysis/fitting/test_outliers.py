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
    return table.assign(loss=table["loss"].where(table["run_id"] != RUN, table["loss"] * 1.06))


def test_an_outlier_is_named_with_its_rule_and_stays_in_the_fit(table: pd.DataFrame) -> None:
    document = fit(table)
    fitted = document.architectures["cross_transformer"]
    (note,) = [note for note in fitted.notes if note.code == "outliers"]
    assert RUN in note.text
    assert "10 robust standard deviations" in note.text
    assert fitted.n_points == 18
    assert "outliers" not in {note.code for note in document.architectures["prefix_simba"].notes}


def test_runs_that_diverged_have_no_weight_and_are_named(table: pd.DataFrame) -> None:
    """Three of 36 runs at up to 3.5 times their loss change no law, hide no effect of size and widen no interval."""
    clean = SyntheticStudy(seeds=(2,) * 4).table(0)
    lost = ["prefix_simba-300000-0-800", "prefix_simba-3000000-1-1600", "cross_transformer-100000-1-400"]
    off = clean["run_id"].map(dict(zip(lost, (2.6, 3.5, 2.9), strict=True))).fillna(1.0)
    whole, without = fit(clean.assign(loss=clean["loss"] * off)), fit(clean[off == 1.0])
    for name, one in whole.architectures.items():
        assert one.params["alpha"] == pytest.approx(without.architectures[name].params["alpha"], rel=0.03)
        (note,) = [note for note in one.notes if note.code == "diverged_points"]
        assert all(run in note.text for run in lost if run.startswith(name))
        assert one.size_effect_p is not None
        assert one.size_effect_p < 0.01
    first, second = (
        max(document.comparison.size_ratio, key=lambda row: row.tokens) for document in (whole, without)
    )
    assert first.estimate == pytest.approx(second.estimate, rel=0.01)


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
