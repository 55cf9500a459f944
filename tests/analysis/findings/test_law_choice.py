"""The law is chosen by what it predicts: the largest compute, left out; a rejected one identifies nothing."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from analysis.errors import InputError
from analysis.findings.document import fit_points
from analysis.findings.law_choice import choose_law
from analysis.findings.results import FitDocument
from analysis.fitting.held_out import Drift, compute_rungs, held_out_compute
from analysis.laws.catalogue import AUTOMATIC, CHINCHILLA, COUPLED, laws_named
from analysis.points.table import check_points, read_table
from analysis.report.headlines import headlines
from analysis.report.tables import print_fit
from tests.analysis.conftest import checked, fit, note_codes
from tests.analysis.simulators import ARM, CAMPAIGNS, REFERENCE, Campaign

ONE_SEED = replace(CAMPAIGNS["coupled"], seeds=1)
ASKS = {"reference": REFERENCE, "resamples": 100}


@pytest.fixture(scope="module")
def chosen() -> FitDocument:
    return fit(ONE_SEED.table(1), law="auto", **ASKS)


@pytest.fixture(scope="module")
def additive() -> FitDocument:
    return fit(ONE_SEED.table(1), **ASKS)


def test_auto_takes_the_law_that_made_the_points_and_says_why(chosen: FitDocument) -> None:
    choice = chosen.law_choice
    assert choice is not None
    assert (chosen.law, choice.chosen, choice.asked) == (
        "coupled",
        "coupled",
        ("chinchilla", "coupled", "moving"),
    )
    assert "largest compute" in choice.reason
    laws = {one.law: one for one in choice.laws}
    assert not laws["chinchilla"].admissible
    assert "pattern" in laws["chinchilla"].reason
    assert laws["coupled"].admissible
    assert (laws["coupled"].largest_compute_rms or 1.0) < 0.5 * (
        laws["chinchilla"].largest_compute_rms or 0.0
    )
    (row, *_) = chosen.comparison.size_ratio
    best = max(chosen.comparison.size_ratio, key=lambda row: (row.reference_n_params, row.tokens))
    assert best.status == "identified"
    assert best.ci95 is not None
    assert best.ci95[0] <= ONE_SEED.ratio(row.reference_n_params, best.tokens) <= best.ci95[1]


def test_nothing_is_identified_by_a_law_that_the_residuals_reject(additive: FitDocument) -> None:
    assert "law_rejected" in note_codes(additive, ARM)
    for row in (*additive.comparison.size_ratio, *additive.comparison.token_gain):
        assert row.status == "not_identified"
        assert row.ci95 is None
    row = additive.comparison.size_ratio[0]
    assert (row.ratio, row.estimate is None) == (None, False)
    assert "law chinchilla is rejected" in row.reason
    assert {gain.status for gain in additive.comparison.compute_gain} == {"not_identified"}


def test_a_law_that_was_named_shows_its_errors_over_all_architectures(additive: FitDocument) -> None:
    choice = additive.law_choice
    assert choice is not None
    (only,) = choice.laws
    assert (choice.chosen, only.law, only.admissible) == ("chinchilla", "chinchilla", False)
    splits = [one.heldout.largest_compute for one in additive.architectures.values()]
    errors = [point.relative_error for split in splits if split for point in split.points]
    assert only.largest_compute_rms == pytest.approx(np.sqrt(np.mean(np.log1p(errors) ** 2)), rel=1e-6)


def test_what_other_laws_say_stands_beside_the_headline(additive: FitDocument, chosen: FitDocument) -> None:
    plain = {one.law: one for one in additive.comparison.other_laws}
    top = max(additive.comparison.size_ratio, key=lambda row: (row.reference_n_params, row.tokens))
    assert "coupled" in plain
    assert "chinchilla" not in {one.law for one in chosen.comparison.other_laws}
    for one in plain.values():
        assert (one.tokens, one.reference_n_params) == (top.tokens, top.reference_n_params)
        assert one.ci95 is None
    assert all(one.ci95 is not None for one in chosen.comparison.other_laws)
    true = ONE_SEED.ratio(top.reference_n_params, top.tokens)
    assert plain["coupled"].ratio == pytest.approx(true, rel=0.25)


def test_the_headline_says_what_other_laws_say_and_refuses_the_number_of_a_rejected_one(
    additive: FitDocument, chosen: FitDocument
) -> None:
    (refused,), (said,) = headlines(additive), headlines(chosen)
    assert (
        "by the losses themselves, without a law. No ratio by the law is identified: law chinchilla"
        in refused
    )
    for text, document in ((refused, additive), (said, chosen)):
        others = [one.law for one in document.comparison.other_laws]
        assert all(f" by {law}" in text.partition("do not reject give")[2] for law in others)
    assert "coupled" in refused


def test_the_terminal_shows_the_laws_tried_and_what_others_say(chosen: FitDocument) -> None:
    printed = io.StringIO()
    points = checked(ONE_SEED.table(1))
    print_fit(Console(file=printed, width=250), points, chosen)
    text = printed.getvalue()
    assert "errors over all architectures" in text
    assert "its residuals have a pattern" in text
    assert f"law coupled: {((chosen.law_choice and chosen.law_choice.reason) or '')[:40]}" in text
    assert ("size ratio by other laws" in text) == bool(chosen.comparison.other_laws)


def test_of_an_additive_truth_the_simplest_law_is_taken() -> None:
    names = []
    for seed in range(3):
        tried, choice, _ = choose_law(checked(CAMPAIGNS["one_seed"].table(seed)), AUTOMATIC, 1e-3, seed)
        names.append(tried.law.name)
        assert {one.law for one in choice.laws} == {"chinchilla", "coupled", "moving"}
    assert names.count("chinchilla") >= 2


def test_a_law_with_more_parameters_must_win_by_more_than_the_noise() -> None:
    """Here the coupled law predicts a little better, by chance: the points are those of an additive law."""
    tried, choice, (other,) = choose_law(
        checked(CAMPAIGNS["three_seeds"].table(7)), (COUPLED, CHINCHILLA), 1e-3, 7
    )
    errors = [np.mean(found**2) for one in (tried, other) if (found := one.errors("compute")) is not None]
    assert errors[0] > errors[1]
    assert tried.law is CHINCHILLA
    assert "chinchilla has fewer parameters than coupled" in choice.reason


def test_laws_are_asked_for_by_name_or_in_a_list() -> None:
    assert laws_named("auto") == AUTOMATIC
    assert laws_named("coupled, chinchilla") == (COUPLED, CHINCHILLA)
    with pytest.raises(InputError, match="--law nonsense"):
        laws_named("chinchilla,nonsense")


def test_a_law_whose_column_is_missing_is_not_tried() -> None:
    points = checked(ONE_SEED.table(0))
    _, choice, _ = choose_law(points, laws_named("chinchilla,data_constrained"), 1e-3, 0)
    assert [one.law for one in choice.laws] == ["chinchilla"]
    with pytest.raises(InputError, match="unique_tokens"):
        choose_law(points, laws_named("data_constrained"), 1e-3, 0)


def test_the_choice_is_part_of_the_document_and_one_of_before_has_none(
    chosen: FitDocument, additive: FitDocument
) -> None:
    dumped = json.loads(json.dumps(chosen.model_dump(mode="json"), allow_nan=False))
    assert FitDocument.model_validate(dumped).model_dump(mode="json") == dumped
    before = additive.model_dump(mode="json")
    del before["law_choice"], before["comparison"]["other_laws"]
    for one in before["architectures"].values():
        del one["heldout"]["largest_compute"]
    read = FitDocument.model_validate(before)
    assert (read.law_choice, read.comparison.other_laws) == (None, ())


def test_the_largest_compute_is_left_out_too_and_shows_what_the_other_splits_hide(
    additive: FitDocument,
) -> None:
    for name, one in additive.architectures.items():
        split = one.heldout.largest_compute
        assert split is not None
        assert split.column == "flops"
        assert split.determined
        assert 8 <= len(split.points) <= 10
        assert min(6 * point.n_params * point.tokens for point in split.points) >= split.threshold * (
            1 - 1e-9
        )
        assert split.rms_relative_error > 3 * one.heldout.in_sample_rms or name


def test_rungs_of_compute_are_found_though_budgets_vary() -> None:
    budgets = np.concatenate([rung * np.array([0.93, 1.0, 1.08]) for rung in (1e18, 3e18, 1e19)])
    assert compute_rungs(budgets) == pytest.approx([0.93e18, 2.79e18, 9.3e18])
    assert not compute_rungs(checked(ONE_SEED.table(0)).of(REFERENCE)["flops"].to_numpy())


def test_less_is_left_out_where_the_rest_would_not_determine_the_law() -> None:
    """Three budgets of three sizes whose compute grows with both: without the top rung all sizes must remain."""
    table = Campaign(sizes=dict.fromkeys((REFERENCE, ARM), (1e8, 2e8, 4e8))).table(0)
    frame = checked(table).of(REFERENCE)
    x, compute = CHINCHILLA.x(frame), frame["flops"].to_numpy()
    split = held_out_compute(CHINCHILLA, x, frame["loss"].to_numpy(), 1e-3, compute)
    assert split is not None
    assert split.determined
    assert len(np.unique(x[~split.left_out][:, 0])) == 3


def test_an_error_beyond_the_points_grows_in_proportion_and_is_none_inside() -> None:
    drift = Drift(0.01, 0.5)
    assert (drift.at(-1.0), drift.at(0.5), drift.at(1.5)) == (0.0, 0.01, pytest.approx(0.03))


def test_a_run_beyond_the_points_of_a_rejected_law_lies_in_its_interval(additive: FitDocument) -> None:
    rejected_ends = additive.architectures[REFERENCE].predictions[-1]
    truth = ONE_SEED.laws[REFERENCE].loss(rejected_ends.n_params, rejected_ends.tokens or 0.0)
    assert rejected_ends.run95 is not None
    assert rejected_ends.run95[0] <= truth <= rejected_ends.run95[1]
    assert rejected_ends.ci95 is not None
    assert rejected_ends.run95[1] - rejected_ends.run95[0] > rejected_ends.ci95[1] - rejected_ends.ci95[0]


def test_the_case_of_coupled_points(cases: Path) -> None:
    right = json.loads((cases / "right.json").read_text(encoding="utf-8"))["coupled.csv"]["size_ratio_at"]
    points = check_points(read_table(cases / "coupled.csv"))
    additive, coupled = (
        fit_points(points, law=law, resamples=200, reference=REFERENCE) for law in ("chinchilla", "auto")
    )
    assert "law_rejected" in {note.code for note in additive.notes}
    assert coupled.law == "coupled"
    row = max(coupled.comparison.size_ratio, key=lambda row: (row.reference_n_params, row.tokens))
    assert row.ci95 is not None
    assert row.ci95[0] <= right["ratio"] <= row.ci95[1]


@pytest.mark.verify
@pytest.mark.timeout(3600)
def test_under_the_wrong_law_nothing_is_identified_and_further_runs_lie_in_their_intervals() -> None:
    """Runs at four times the largest size, under an additive law of points in which size and data act together."""
    inside, rng = [], np.random.default_rng(0)
    for seed in range(100):
        document = fit(ONE_SEED.table(seed), **ASKS)
        assert {row.status for row in document.comparison.size_ratio} == {"not_identified"}
        for name, one in document.architectures.items():
            far = one.predictions[-1]
            assert far.run95 is not None
            runs = ONE_SEED.laws[name].loss(far.n_params, far.tokens or 0.0) * np.exp(
                rng.normal(0, 0.0028, 20)
            )
            inside.append(np.mean((far.run95[0] <= runs) & (runs <= far.run95[1])))
    assert np.mean(inside) >= 0.9


@pytest.mark.verify
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("campaign", [ONE_SEED, CAMPAIGNS["one_seed"]], ids=["coupled", "additive"])
def test_the_intervals_of_the_law_that_auto_takes_hold_the_truth(campaign: Campaign) -> None:
    holds = []
    for seed in range(100):
        document = fit(campaign.table(seed), law="auto", reference=REFERENCE, resamples=200)
        row = max(document.comparison.size_ratio, key=lambda row: (row.reference_n_params, row.tokens))
        assert row.estimate_ci95 is not None
        low, high = row.estimate_ci95
        holds.append(low <= campaign.ratio(row.reference_n_params, row.tokens) <= high)
    assert np.mean(holds) >= 0.9
