"""Patterns in residuals: the law of the points is seldom rejected, and one that lacks what made them nearly always."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from analysis.findings.comparison import fit_all
from analysis.fitting import patterns
from analysis.fitting.patterns import Pattern, pattern
from analysis.laws.catalogue import CHINCHILLA, law_named
from analysis.laws.law import Law
from tests.analysis.conftest import checked
from tests.analysis.simulators import CAMPAIGNS, REFERENCE, SSM, TRANSFORMER, Campaign, coupled

ONE_SEED = replace(CAMPAIGNS["coupled"], seeds=1)


def found(campaign: Campaign, seed: int, law: Law = CHINCHILLA) -> Pattern:
    judged = pattern(fit_all(checked(campaign.table(seed)).frames, law, 1e-3), seed)
    assert judged is not None
    return judged


def rejections(campaign: Campaign, studies: Sequence[int], law: Law = CHINCHILLA) -> int:
    return sum(found(campaign, seed, law).rejects for seed in studies)


@pytest.mark.parametrize("name", ["one_seed", "outliers_one_seed", "noisy_small", "isoflop"])
def test_the_law_of_the_points_is_seldom_rejected(name: str) -> None:
    assert rejections(CAMPAIGNS[name], range(8)) <= 1


@pytest.mark.parametrize(
    "campaign",
    [CAMPAIGNS["coupled"], ONE_SEED, replace(ONE_SEED, outliers=0.04), replace(ONE_SEED, laws=coupled(0.7))],
    ids=["three seeds", "one seed", "outliers", "gamma 0.7"],
)
def test_an_additive_law_of_coupled_points_is_rejected(campaign: Campaign) -> None:
    assert rejections(campaign, range(4)) >= 3
    assert found(campaign, 0).term in {"size and data acting together", "curvature in compute"}


def test_the_coupled_law_of_coupled_points_is_not_rejected() -> None:
    assert rejections(CAMPAIGNS["coupled"], range(4), law_named("coupled")) == 0


def test_architectures_are_judged_together() -> None:
    """One seed leaves seven series each: no signs of seven are improbable enough, and those of both arms are."""
    fits = fit_all(checked(ONE_SEED.table(0)).frames, CHINCHILLA, 1e-3)
    assert not any(judged.rejects for fit in fits if (judged := pattern([fit], 0)))
    assert found(ONE_SEED, 0).rejects


def test_one_architecture_of_two_that_bends_is_enough() -> None:
    laws = {REFERENCE: TRANSFORMER, "ssm": replace(SSM, gamma=0.5)}
    assert found(replace(CAMPAIGNS["coupled"], laws=laws), 0).rejects


def test_signs_are_drawn_some_at_a_time_with_the_same_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = found(CAMPAIGNS["three_seeds"], 0)
    monkeypatch.setattr(patterns, "FLIPPED", 3000)
    assert found(CAMPAIGNS["three_seeds"], 0).p == pytest.approx(whole.p, abs=0.05)


def test_a_law_that_meets_all_points_has_no_residuals_to_judge() -> None:
    table = replace(CAMPAIGNS["one_seed"], series_noise=0.0, row_noise=0.0).table(0)
    judged = pattern(fit_all(checked(table).frames, CHINCHILLA, 1e-3), 0)
    assert judged is None or not judged.rejects or judged.size < 1e-6


@pytest.mark.verify
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", [name for name in CAMPAIGNS if name != "coupled"])
def test_an_additive_truth_is_rejected_in_two_of_a_hundred_campaigns_or_fewer(name: str) -> None:
    # Two standard errors of two per cent in two hundred are two per cent.
    assert rejections(CAMPAIGNS[name], range(200)) <= 8


@pytest.mark.verify
@pytest.mark.timeout(3600)
def test_a_coupled_truth_is_rejected_in_nearly_all_campaigns() -> None:
    assert rejections(CAMPAIGNS["coupled"], range(40)) == 40
    assert rejections(ONE_SEED, range(100)) >= 95
