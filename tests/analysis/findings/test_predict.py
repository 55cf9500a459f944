"""Predicted losses, and points taken mid-run beside annealed ones."""

from __future__ import annotations

import pandas as pd
import pytest

from analysis.errors import InputError
from analysis.findings.document import fit_points
from analysis.findings.notes import prediction_notes
from analysis.findings.predict import Ask, asked, predict
from analysis.findings.results import FitDocument
from analysis.laws.catalogue import CHINCHILLA
from analysis.points.table import CheckedPoints
from tests.analysis.conftest import checked, fit, joined, note_codes
from tests.analysis.synthetic import TOKENS_AN_ITERATION, TRANSFORMER, WIDE, loss_by


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("300M:4000", Ask(3e8, 4e3)),
        ("1e9:20Btokens", Ask(1e9, 2e10, "tokens")),
        (" 1.5b : 8k iterations ", Ask(1.5e9, 8e3, "iterations")),
    ],
)
def test_sizes_and_budgets_are_read_as_written(text: str, meant: Ask) -> None:
    assert asked(text) == meant


@pytest.mark.parametrize(
    "text", ["", "300M", "300M:", "big:400", "1e9:-4", "0:100", "1e30:100", "1M:2 epochs"]
)
def test_what_is_no_size_and_budget_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="--predict"):
        asked(text)


def test_the_loss_of_a_larger_model_is_predicted_with_intervals_that_hold_it(wide: CheckedPoints) -> None:
    document = fit_points(wide, resamples=300, asks=[asked("40M:1600"), asked("1M:400")])
    far, near = document.architectures["cross_transformer"].predictions
    assert (far.size_factor, near.size_factor) == (pytest.approx(4), 1.0)
    assert (far.budget_factor, near.budget_factor) == (1.0, 1.0)
    for one in (far, near):
        assert one.ci95 is not None
        assert one.run95 is not None
        assert one.iterations is not None
        assert one.tokens == pytest.approx(one.iterations * TOKENS_AN_ITERATION)
        truth = loss_by(TRANSFORMER, one.n_params, one.tokens)
        assert one.loss == pytest.approx(truth, rel=0.01)
        assert one.ci95[0] <= truth <= one.ci95[1]
        assert one.run95[1] - one.run95[0] > one.ci95[1] - one.ci95[0]


def test_unasked_twice_and_four_times_the_largest_size_are_predicted(document: FitDocument) -> None:
    for own in document.architectures.values():
        assert [(one.n_params, one.iterations) for one in own.predictions] == [(6e6, 1600), (1.2e7, 1600)]


def test_tokens_and_iterations_name_the_same_budget_under_either_law(wide: CheckedPoints) -> None:
    asks = [asked("40M:800"), asked(f"40M:{800 * TOKENS_AN_ITERATION:.0f}tokens")]
    for law in ("chinchilla", "chinchilla_iterations"):
        document = fit_points(wide, law=law, resamples=100, asks=asks)
        one, other = document.architectures["prefix_simba"].predictions
        assert one.loss == pytest.approx(other.loss, rel=1e-12)
    with pytest.raises(InputError, match="no iterations"):
        fit(WIDE.table(0).drop(columns="iterations"), asks=[asked("1M:100iterations")])


def test_a_prediction_far_beyond_the_points_is_noted_and_one_close_by_is_not(wide: CheckedPoints) -> None:
    one = joined(wide)["prefix_simba"]
    for text, noted in (("100M:1600", True), ("40M:1600", False), ("1M:16000", True)):
        notes = prediction_notes(predict(one.curve, [asked(text)], one.fit.residual, 0))
        assert [note.code for note in notes] == ["extrapolation_ratio"] * noted


def mixed() -> pd.DataFrame:
    """Annealed points and, 3 % above them, points taken mid-run."""
    annealed = WIDE.table(0)
    mid_run = annealed.assign(loss=annealed["loss"] * 1.03, annealed=False, run_id=annealed["cluster"])
    return pd.concat([annealed, mid_run])


@pytest.mark.parametrize(
    ("annealed", "other", "gap"), [(True, "unannealed", 0.03), (False, "annealed", -0.0291)]
)
def test_points_taken_mid_run_are_a_set_of_their_own_and_compared_with_the_annealed(
    annealed: bool, other: str, gap: float
) -> None:
    points = checked(mixed(), CHINCHILLA, annealed=annealed)
    assert set(points.frame["annealed"]) == {annealed}
    document = fit_points(points, resamples=100)
    assert document.points == ("annealed" if annealed else "unannealed")
    for name, one in document.architectures.items():
        assert {f"{other}_points", f"{other}_gap"} <= note_codes(document, name)
        assert one.n_points == 48
        assert one.other_points is not None
        assert (one.other_points.kind, one.other_points.points) == (other, 48)
        assert one.other_points.mean_relative_difference == pytest.approx(gap, abs=0.002)


def test_a_table_without_points_taken_mid_run_has_none_to_fit() -> None:
    with pytest.raises(InputError, match="annealed=false"):
        checked(WIDE.table(0), CHINCHILLA, annealed=False)
