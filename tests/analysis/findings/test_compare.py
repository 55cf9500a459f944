"""Size ratio and compute gain: correct for known laws, and no number where the points do not identify one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from analysis.errors import InputError
from analysis.findings.curve import Curve
from analysis.findings.equal_loss import SizeRatio, size_ratios
from analysis.findings.results import FitDocument
from analysis.laws.catalogue import CHINCHILLA
from analysis.text import times
from tests.analysis.conftest import checked, compared, fit, note_codes
from tests.analysis.synthetic import QUIET, SIMBA, TRANSFORMER, TRUE_RATIO, SyntheticStudy, against, loss_by


def headline_row(table: pd.DataFrame | SyntheticStudy, resamples: int = 100) -> SizeRatio:
    """Return the size ratio at the largest reference and the longest budget."""
    rows = compared(table, resamples).size_ratio
    return max(rows, key=lambda row: (row.reference_n_params, row.tokens))


def test_the_known_ratio_comes_back_at_every_budget_and_size(quiet: FitDocument) -> None:
    rows = quiet.comparison.size_ratio
    assert len(rows) == 12
    assert {row.iterations for row in rows} == {400, 800, 1600}
    for row in rows:
        assert row.estimate == pytest.approx(TRUE_RATIO, rel=0.01)
        assert row.ratio == (row.estimate if row.status == "identified" else None)
        assert row.ci95 == (row.estimate_ci95 if row.status == "identified" else None)
        assert row.loss == pytest.approx(loss_by(TRANSFORMER, row.reference_n_params, row.tokens), rel=1e-4)
        assert row.n_params == pytest.approx(row.reference_n_params / TRUE_RATIO, rel=0.01)


def test_an_equal_size_below_the_trained_ones_is_an_extrapolation_and_says_so(quiet: FitDocument) -> None:
    for row in quiet.comparison.size_ratio:
        outside = row.reference_n_params / TRUE_RATIO < 1e5
        assert row.status == ("extrapolated" if outside else "identified")
        assert bool(row.reason) == outside
    assert "extrapolation" in note_codes(quiet)


def test_a_budget_an_architecture_was_never_trained_at_is_an_extrapolation_and_says_so() -> None:
    """SiMBA saw 6.4M to 25.6M tokens, the transformer 16 times as many."""
    table = QUIET.table(0).drop(columns=["iterations", "flops"])
    base = table["architecture"] == "cross_transformer"
    tokens = table["tokens"] * np.where(base, 16, 1)
    clean = loss_by(TRANSFORMER, table["n_params"], tokens)
    table = table.assign(tokens=tokens, loss=np.where(base, clean, table["loss"]))
    rows = compared(table).size_ratio
    assert {row.tokens / 25.6e6 for row in rows} == {4, 8, 16}
    for row in rows:
        assert (row.status, row.ratio, row.ci95) == ("extrapolated", None, None)
        assert row.estimate == pytest.approx(TRUE_RATIO, rel=0.02)
        far = f"the budget lies {times(row.tokens / 25.6e6)} times above the longest of Prefix SiMBA"
        assert far in row.reason
        assert ("equal size" in row.reason) == (row.reference_n_params / TRUE_RATIO < 1e5)


def test_budgets_within_a_hundredth_count_as_the_same() -> None:
    table = QUIET.table(0).drop(columns=["iterations"])
    base = table["architecture"] == "cross_transformer"
    table["tokens"] = table["tokens"] * np.where(base, 1.009, 1)
    rows = compared(table).size_ratio
    assert "identified" in {row.status for row in rows if row.tokens > 25.6e6}


@pytest.mark.parametrize(
    ("study", "reason"),
    [
        (SyntheticStudy(laws=against(E=3.4)), "no size of Prefix SiMBA"),
        (SyntheticStudy(sizes=(1e5, 1e6), seeds=(3, 1)), "fewer than 3 sizes"),
        (replace(QUIET, laws=against(A=1e-9)), "fall with size"),
    ],
)
def test_a_ratio_that_the_points_do_not_identify_has_no_number(study: SyntheticStudy, reason: str) -> None:
    row = headline_row(study)
    assert (row.status, row.ratio, row.ci95, row.n_params) == ("not_identified", None, None, None)
    assert reason in row.reason


def test_no_ratio_where_size_and_data_were_varied_together() -> None:
    table = QUIET.table(0)
    rung = table["n_params"].map({1e5: 400, 3e5: 800, 1e6: 1600})
    document = fit(table[table["iterations"] == rung])
    assert {row.status for row in document.comparison.size_ratio} == {"not_identified"}
    assert "collinear" in note_codes(document)


def test_the_reference_is_the_transformer_unless_another_is_named(quiet: FitDocument) -> None:
    assert quiet.comparison.reference == "cross_transformer"
    assert "default_reference" in note_codes(quiet)
    turned = fit(QUIET, reference="prefix_simba")
    assert "default_reference" not in note_codes(turned)
    row = next(row for row in turned.comparison.size_ratio if row.reference_n_params == 3e5)
    assert row.estimate == pytest.approx(1 / TRUE_RATIO, rel=0.01)
    with pytest.raises(InputError, match="--reference mamba"):
        fit(QUIET, reference="mamba")


@pytest.mark.parametrize("without", ["prefix_simba", ""], ids=["one architecture", "both"])
def test_budgets_are_tokens_where_an_architecture_has_no_iterations(without: str) -> None:
    table = QUIET.table(0)
    table["iterations"] = table["iterations"].where(~table["architecture"].str.contains(without))
    comparison = compared(table)
    for rows in (comparison.size_ratio, comparison.token_gain):
        assert {row.iterations for row in rows} == {None}
        assert "not_identified" not in {row.status for row in rows}
    assert {row.tokens for row in comparison.size_ratio} == {6.4e6, 12.8e6, 25.6e6}
    for row in comparison.size_ratio:
        assert row.estimate == pytest.approx(TRUE_RATIO, rel=0.01)


def test_each_architecture_is_read_at_its_own_tokens_of_an_iteration_count() -> None:
    """SiMBA has twice the tokens in an iteration: its law in tokens is read at twice the tokens."""
    table = QUIET.table(0)
    simba = table["architecture"] == "prefix_simba"
    law = SIMBA
    tokens = table["tokens"] * np.where(simba, 2, 1)
    clean = loss_by(law, table["n_params"], tokens)
    row = headline_row(table.assign(tokens=tokens, loss=np.where(simba, clean, table["loss"])))
    gain = law["B"] / row.tokens ** law["beta"] - law["B"] / (2 * row.tokens) ** law["beta"]
    target = TRANSFORMER["A"] / row.reference_n_params ** TRANSFORMER["alpha"] + gain
    assert row.n_params == pytest.approx((law["A"] / target) ** (1 / law["alpha"]), rel=0.02)


def test_compute_gain_follows_from_the_flops_of_the_points(quiet: FitDocument) -> None:
    gains = quiet.comparison.compute_gain
    assert len(gains) == 12
    for row in gains:  # six FLOPs a parameter and token, a fifth more for SiMBA
        assert row.gain == pytest.approx(TRUE_RATIO / 1.2, rel=0.02)
    assert compared(QUIET.table(0).drop(columns="flops")).compute_gain == ()


def test_no_ratio_where_resampled_laws_stay_above_the_loss() -> None:
    row = headline_row(SyntheticStudy(laws=against(E=2.65)).table(3), resamples=200)
    assert (row.status, row.ratio, row.estimate_ci95) == ("not_identified", None, None)
    assert "too many resamples never reach the loss" in row.reason


@pytest.mark.parametrize(
    ("far", "reason"),
    [
        ({"E": 6.0}, "too many resamples never reach the loss"),
        ({"A": 1e-9, "E": 2.0}, "too many resamples are below the loss at any size"),
    ],
)
def test_the_reason_names_the_end_that_an_interval_lacks(far: dict[str, float], reason: str) -> None:
    """One resample in ten is far from the others: above the loss at every size, or below it at every size."""
    frame = checked(QUIET.table(0)).of("cross_transformer")
    base, near, other = (
        [law[name] for name in CHINCHILLA.names] for law in (TRANSFORMER, SIMBA, SIMBA | far)
    )
    arm = np.array([near] * 37 + [other] * 4)
    curves = {
        "prefix_simba": Curve(CHINCHILLA, arm, frame),
        "cross_transformer": Curve(CHINCHILLA, np.array([base] * 41), frame),
    }
    for row in (one.ratio for one in size_ratios(curves, "cross_transformer")):
        assert (row.status, row.ratio, row.ci95) == ("not_identified", None, None)
        assert row.reason == f"its 95 % interval has no end: {reason}"


def test_token_gain_is_that_of_the_known_laws_at_equal_size(quiet: FitDocument) -> None:
    gains = quiet.comparison.token_gain
    assert {row.iterations for row in gains} == {400, 800, 1600}
    for row in gains:
        law, other = TRANSFORMER, SIMBA
        saved = (law["A"] - other["A"]) / row.reference_n_params ** law["alpha"]
        left = law["B"] / row.reference_tokens ** law["beta"] + saved
        tokens = (other["B"] / left) ** (1 / other["beta"])
        assert row.tokens == pytest.approx(tokens, rel=0.01)
        assert row.estimate == pytest.approx(row.reference_tokens / tokens, rel=0.01)
        inside = 400 * 16_000 <= tokens <= 1600 * 16_000
        assert row.status == ("identified" if inside else "extrapolated")
        assert row.gain == (row.estimate if inside else None)
        assert bool(row.reason) != inside


def test_token_gain_counts_tokens_under_a_law_in_iterations_too(quiet: FitDocument) -> None:
    by_iterations = fit(QUIET, law="chinchilla_iterations")
    for one, other in zip(quiet.comparison.token_gain, by_iterations.comparison.token_gain, strict=True):
        assert other.estimate == pytest.approx(one.estimate, rel=0.01)
        assert other.tokens == pytest.approx(one.tokens, rel=0.01)


def test_no_token_gain_where_no_training_reaches_the_loss() -> None:
    (row, *_) = compared(SyntheticStudy(laws=against(E=6.0))).token_gain
    assert (row.status, row.gain, row.estimate) == ("not_identified", None, None)
    assert "no amount of training" in row.reason
