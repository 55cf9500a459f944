"""Intervals of ratios and predictions by a fitted law hold the truth of simulated campaigns in about 95 of 100.

Under a law that is wrong no ratio is identified, and without an effect of size none is either. The simulators do not
use the fitting code. Forty campaigns of some kinds are judged, 200 of every kind by `make verify`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from analysis.findings.comparison import FittedArchitecture, fit_all
from analysis.findings.equal_loss import compare_at
from analysis.findings.notes import rejected_because
from analysis.fitting.bootstrap import interval, resample
from analysis.fitting.patterns import pattern
from analysis.laws.catalogue import CHINCHILLA
from tests.analysis.conftest import checked
from tests.analysis.findings.test_honesty import FULL, QUICK, cell_of
from tests.analysis.simulators import ARM, CAMPAIGNS, REFERENCE

DRAWS = 200
BEYOND = 4.0  # largest sizes
WIDEST = {"one_seed": 0.36, "three_seeds": 0.165, "outliers": 0.17}
"""Mean log width of the ratio's interval; least squares with known noise has 0.265, 0.146 and 0.146."""
REFUSED = ("coupled", "no_size")
TRUE_LAW = sorted(set(CAMPAIGNS) - set(REFUSED))


@dataclass(frozen=True)
class Judged:
    """Shares of simulated campaigns: intervals that hold the true ratio, or the loss beyond; ratios identified."""

    holds: float
    predicts: float
    identified: float
    width: float


def judged(name: str, studies: int) -> Judged:
    campaign, at = CAMPAIGNS[name], cell_of(name)
    truth = campaign.ratio(at.n_params, at.tokens)
    holds, predicts, identified, widths = [], [], [], []
    for seed in range(studies):
        points = checked(campaign.table(seed))
        fits = fit_all(points.frames, CHINCHILLA)
        drawn = resample(fits, DRAWS, 0)
        rejected = rejected_because(CHINCHILLA, pattern(fits, 0))
        arms = {fit.architecture: FittedArchitecture.of(fit, points, drawn, rejected).curve for fit in fits}
        found = compare_at(arms, REFERENCE, at)[ARM]
        identified.append(found.ratio.status == "identified")
        low, high = np.percentile(np.nan_to_num(found.values[1:], posinf=1e9), [2.5, 97.5])
        holds.append(low <= truth <= high)
        widths.append(np.log(high / max(low, 1e-9)))
        for arm, curve in arms.items():
            n_params, tokens = BEYOND * curve.sizes[-1], float(curve.frame["tokens"].max())
            ends = interval(curve.loss(n_params, tokens)[1:])
            predicts.append(ends[0] <= campaign.laws[arm].loss(n_params, tokens) <= ends[1])
    return Judged(*(float(np.mean(values)) for values in (holds, predicts, identified, widths)))


def is_honest(found: Judged, studies: int) -> bool:
    """True if 92 to 98 % of both intervals hold the truth, give or take two standard errors of so many studies."""
    slack = 2 * float(np.sqrt(0.95 * 0.05 / studies))
    return all(0.92 - slack <= share <= 0.98 + slack for share in (found.holds, found.predicts))


@pytest.mark.parametrize("name", ["one_seed", "null"])
def test_intervals_of_a_right_law_hold_the_truth(name: str) -> None:
    found = judged(name, QUICK)
    assert is_honest(found, QUICK), found
    assert found.width <= WIDEST.get(name, np.inf)


def test_a_wrong_law_identifies_no_ratio() -> None:
    assert judged("coupled", QUICK // 4).identified == 0


@pytest.mark.verify
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", TRUE_LAW)
def test_intervals_of_a_right_law_hold_the_truth_in_200_campaigns_of_each_kind(name: str) -> None:
    found = judged(name, FULL)
    print(f"{name}: {found}")
    assert is_honest(found, FULL), found
    assert found.width <= WIDEST.get(name, np.inf)
    assert found.identified >= 0.9


@pytest.mark.verify
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", REFUSED)
def test_one_campaign_in_a_hundred_at_most_is_identified_where_the_points_tell_no_ratio(name: str) -> None:
    found = judged(name, FULL)
    print(f"{name}: {found}")
    assert found.identified <= 0.01
