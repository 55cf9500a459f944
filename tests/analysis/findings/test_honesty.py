"""Intervals hold the known answer of simulated campaigns in about 95 of 100, whatever the law, and claim nothing else.

The simulators do not use the fitting code. Forty campaigns of a kind are judged, 200 by `make verify`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from analysis.findings.curve import Rung
from analysis.findings.equal_loss import compare_at
from analysis.findings.local_curves import ModelFree, model_free
from tests.analysis.conftest import true_curves
from tests.analysis.simulators import ARM, CAMPAIGNS, REFERENCE, SIZES, TOKENS, Campaign

QUICK, FULL = 40, 200
DRAWS = 300
HEADLINE = Rung(SIZES[-1], None, TOKENS[-1])


def cell_of(name: str) -> Rung:
    """Return the reference's rung at which a campaign is judged: the headline that both arms support."""
    campaign = CAMPAIGNS[name]
    if campaign.budgets:
        size = campaign.optimal_size(REFERENCE, campaign.budgets[-1])
        return Rung(size, None, campaign.budgets[-1] / (6 * size))
    if name.startswith("null"):
        return Rung(SIZES[-2], None, TOKENS[-1])  # at the largest size half of the equal sizes lie beyond it
    if name == "unequal":
        return Rung(SIZES[-1], None, TOKENS[-2])
    return HEADLINE


def losses_alone(campaign: Campaign, at: Rung, seed: int) -> ModelFree:
    """Return the model-free ratio of one simulated campaign; the curves' laws are true ones, which it does not use."""
    curves = true_curves(campaign, campaign.table(seed), DRAWS)
    by_law = compare_at(curves, REFERENCE, at)[ARM]
    (found,) = model_free(curves, REFERENCE, [by_law], seed)
    return found


@dataclass(frozen=True)
class Seen:
    """Over simulated campaigns: how many are identified, the share of those that hold the truth, the mean log width."""

    identified: int
    holds: float
    width: float


def seen(name: str, studies: int) -> Seen:
    campaign, at = CAMPAIGNS[name], cell_of(name)
    truth = campaign.ratio(at.n_params, at.tokens)
    found = [one for seed in range(studies) if (one := losses_alone(campaign, at, seed)).ci95 is not None]
    ends = np.array([(one.ci95[0] or 0.0, one.ci95[1] or np.inf) for one in found if one.ci95], dtype=float)
    if not len(ends):
        return Seen(0, 1.0, 0.0)
    closed = ends[(ends[:, 0] > 0) & np.isfinite(ends[:, 1])]
    return Seen(
        len(found),
        float(((ends[:, 0] <= truth) & (truth <= ends[:, 1])).mean()),
        float(np.log(closed[:, 1] / closed[:, 0]).mean()),
    )


def honest(found: Seen, studies: int) -> bool:
    """True if 92 to 98 % of the intervals hold the truth, give or take two standard errors of so many studies."""
    slack = 2 * float(np.sqrt(0.95 * 0.05 / studies))
    return 0.92 - slack <= found.holds <= 0.98 + slack


WIDEST = {"one_seed": 0.36, "three_seeds": 0.21, "outliers": 0.21, "coupled": 0.27, "isoflop": 0.2}
"""Mean log width of the model-free interval of each kind, at most."""


@pytest.mark.parametrize("name", ["one_seed", "outliers", "coupled", "isoflop"])
def test_model_free_ratios_hold_the_truth_also_where_the_additive_law_is_wrong(name: str) -> None:
    found = seen(name, QUICK)
    assert found.identified == QUICK
    assert honest(found, QUICK), found
    assert found.width <= WIDEST[name]


def test_without_an_effect_of_size_no_model_free_ratio_is_identified() -> None:
    assert seen("no_size", QUICK).identified == 0


@pytest.mark.verify
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", sorted(set(CAMPAIGNS) - {"no_size"}))
def test_model_free_ratios_hold_the_truth_in_200_campaigns_of_each_kind(name: str) -> None:
    found = seen(name, FULL)
    print(f"{name}: {found}")
    assert found.identified >= 0.9 * FULL
    assert honest(found, FULL), found
    assert found.width <= WIDEST.get(name, np.inf)


@pytest.mark.verify
@pytest.mark.timeout(3600)
def test_without_an_effect_of_size_one_campaign_in_a_hundred_at_most_is_called_identified() -> None:
    assert seen("no_size", FULL).identified <= 0.01 * FULL
