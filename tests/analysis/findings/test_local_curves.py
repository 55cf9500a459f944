"""Smoothed losses give the size ratio where both curves are seen, and no number elsewhere."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest

from analysis.findings.curve import Rung
from analysis.findings.equal_loss import compare_at, size_ratios
from analysis.findings.local_curves import ModelFree, model_free
from analysis.findings.results import FitDocument
from analysis.report.headlines import headlines
from tests.analysis.conftest import fit, note_codes, true_curves
from tests.analysis.simulators import ARM, CAMPAIGNS, REFERENCE, SIZES, TOKENS, Campaign, Truth

QUIET = Campaign(series_noise=1e-5, row_noise=1e-5)
TOP = Rung(SIZES[-1], None, TOKENS[-1])


def by_losses(campaign: Campaign, at: Rung = TOP, table: pd.DataFrame | None = None) -> ModelFree:
    """Return the model-free ratio of one table of a campaign."""
    curves = true_curves(campaign, table, 200)
    (found,) = model_free(curves, REFERENCE, [compare_at(curves, REFERENCE, at)[ARM]], 0)
    return found


@pytest.mark.parametrize("gamma", [1.0, 0.5, 0.3])
def test_without_noise_the_ratio_is_right_at_every_trained_rung_whatever_the_law(gamma: float) -> None:
    laws = {name: replace(law, gamma=gamma) for name, law in QUIET.laws.items()}
    campaign = replace(QUIET, laws=laws)
    curves = true_curves(campaign)
    found = model_free(curves, REFERENCE, size_ratios(curves, REFERENCE), 0)
    numbers = [one for one in found if one.ratio is not None]
    assert len(numbers) >= 15
    for one in numbers:
        truth = campaign.ratio(one.reference_n_params, one.tokens)
        assert one.ratio == pytest.approx(truth, rel=0.03 if gamma >= 0.5 else 0.1)
        assert one.loss == pytest.approx(
            campaign.laws[REFERENCE].loss(one.reference_n_params, one.tokens), rel=2e-3
        )


def test_beyond_the_sizes_trained_at_a_budget_there_is_no_number() -> None:
    small = by_losses(QUIET, Rung(SIZES[0], None, TOKENS[-1]))
    assert (small.status, small.ratio, small.ci95) == ("not_identified", None, None)
    assert small.reason.startswith("every size of ssm trained at this budget is below a loss of")
    turned = Campaign(
        laws={REFERENCE: QUIET.laws[ARM], ARM: QUIET.laws[REFERENCE]}, series_noise=1e-5, row_noise=1e-5
    )
    assert by_losses(turned).reason.startswith("no size of ssm trained at this budget reaches a loss of")
    longer = Campaign(tokens={REFERENCE: TOKENS, ARM: TOKENS[:3]}, series_noise=1e-5, row_noise=1e-5)
    assert "the budget lies 8.0 times above the longest of ssm" in by_losses(longer).reason


def test_an_end_of_an_interval_beyond_the_trained_sizes_is_open() -> None:
    size = SIZES[0] * CAMPAIGNS["one_seed"].ratio(SIZES[2], TOKENS[-1]) * 1.02
    found = by_losses(CAMPAIGNS["one_seed"], Rung(size, None, TOKENS[-1]))
    assert found.ratio is not None
    assert found.ci95 is not None
    low, high = found.ci95
    assert low is not None
    assert high is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"sizes": SIZES[:2]}, "fewer than 3 sizes"),
        ({"tokens": TOKENS[:1], "sizes": SIZES[:4]}, "fewer than 5 points"),
    ],
)
def test_points_that_determine_no_curve_give_a_reason(
    change: dict[str, tuple[float, ...]], reason: str
) -> None:
    campaign = replace(
        QUIET, **{key: dict.fromkeys((REFERENCE, ARM), values) for key, values in change.items()}
    )
    found = by_losses(campaign, Rung(SIZES[1], None, TOKENS[0]))
    assert found.status == "not_identified"
    assert reason in found.reason


def test_size_and_data_that_vary_together_determine_no_surface() -> None:
    table = QUIET.table(0)
    table["tokens"] = 20 * table["n_params"]
    found = by_losses(QUIET, Rung(SIZES[-1], None, 20 * SIZES[-1]), table)
    assert "vary together" in found.reason


def test_diverged_runs_count_as_if_they_were_not_there() -> None:
    """Three of 84 losses are 2.6 to 3.5 times as high, one of them the reference's own at the headline."""
    table, off = CAMPAIGNS["one_seed"].table(3), [20, 41, 77]
    without = by_losses(CAMPAIGNS["one_seed"], table=table.drop(index=off))
    table.loc[off, "loss"] *= [2.6, 3.5, 2.9]
    found = by_losses(CAMPAIGNS["one_seed"], table=table)
    assert found.ratio == pytest.approx(without.ratio, rel=0.01)
    assert found.ci95 == pytest.approx(without.ci95, rel=0.05)


def test_more_architectures_do_not_change_a_ratio() -> None:
    campaign = CAMPAIGNS["one_seed"]
    table = campaign.table(0)
    other = table[table["architecture"] == ARM].assign(architecture="other")
    other = other.assign(
        loss=1.1 * other["loss"], run_id="o" + other["run_id"], cluster="o" + other["cluster"]
    )
    laws = {**campaign.laws, "other": Truth(2.5, 330.0, 1870.0, 0.355, 0.37)}
    curves = true_curves(replace(campaign, laws=laws), pd.concat([table, other]), 200)
    (found,) = model_free(curves, REFERENCE, [compare_at(curves, REFERENCE, TOP)[ARM]], 0)
    assert found == by_losses(campaign, table=table)


@pytest.fixture(scope="module")
def coupled() -> FitDocument:
    return fit(CAMPAIGNS["coupled"].table(0), reference=REFERENCE)


def test_a_law_that_the_losses_contradict_is_said_to_disagree_with_them(coupled: FitDocument) -> None:
    comparison = coupled.comparison
    assert len(comparison.model_free) == len(comparison.size_ratio)
    for row, free in zip(comparison.size_ratio, comparison.model_free, strict=True):
        assert (row.architecture, row.tokens, row.reference_n_params) == (
            free.architecture,
            free.tokens,
            free.reference_n_params,
        )
    (note,) = [note for note in coupled.notes if note.code == "model_free_disagrees"]
    apart = [one for one in comparison.model_free if one.disagrees]
    assert f"at {len(apart)} of " in note.text
    (sentence,) = headlines(coupled)
    assert "by the losses themselves, without a law" in sentence
    assert "the law alone would give" in sentence


def test_a_law_that_holds_agrees_with_the_losses() -> None:
    document = fit(CAMPAIGNS["three_seeds"].table(0), reference=REFERENCE)
    assert "model_free_disagrees" not in note_codes(document, ARM)
