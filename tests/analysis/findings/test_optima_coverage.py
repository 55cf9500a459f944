"""Intervals of optimal sizes, exponents and frontier gains hold the truth, in campaigns simulated by numpy alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import numpy as np
import pytest

from analysis.findings.frontier import frontier_gains
from analysis.findings.isoflop import optimal_sizes
from analysis.laws.law import Interval
from tests.analysis.conftest import checked, joined, noisy
from tests.analysis.findings.campaigns import Campaign

BASE, ARM = "cross_transformer", "ssm"
BY_LOSSES = ("isoflop", "corrected", "exponent isoflop", "exponent corrected", "frontier")
BY_LAW = ("parametric", "exponent parametric", "frontier by law")


class Tally:
    """Intervals beside the truth, by name."""

    def __init__(self) -> None:
        """Start without intervals."""
        self._hits: dict[str, list[bool]] = defaultdict(list)
        self._widths: dict[str, list[float]] = defaultdict(list)

    def add(self, name: str, ends: Interval | None, truth: float) -> None:
        """Count an interval, if there is one."""
        if ends is not None:
            self._hits[name].append(ends[0] <= truth <= ends[1])
            self._widths[name].append(float(np.log(ends[1] / ends[0])))

    @property
    def held(self) -> dict[str, float]:
        """Share of intervals that hold the truth."""
        return {name: float(np.mean(hits)) for name, hits in self._hits.items()}

    @property
    def width(self) -> dict[str, float]:
        """Mean width of the intervals' logarithms."""
        return {name: float(np.mean(widths)) for name, widths in self._widths.items()}


def tally(campaign: Campaign, tables: int, resamples: int) -> Tally:
    """Analyse so many tables of two architectures."""
    out = Tally()
    exponents = {arm: campaign.exponent(arm) for arm in campaign.laws}
    for seed in range(tables):
        fits = joined(checked(campaign.table(seed)), resamples)
        drawn = noisy(fits, resamples)
        for arm, one in fits.items():
            found = optimal_sizes(one.curve, drawn[arm])
            for name, exponent in found.exponents.items():
                out.add(f"exponent {name}", exponent.ci95, exponents[arm])
            for rung in found.optima:
                best, _ = campaign.at_budget(arm, rung.flops)
                for name in ("isoflop", "corrected", "parametric"):
                    out.add(name, getattr(rung, f"{name}_ci95"), best)
        for row in frontier_gains({arm: one.curve for arm, one in fits.items()}, BASE, drawn):
            true = campaign.gain(ARM, BASE, row.reference_flops)
            out.add("frontier", row.ci95, true)
            out.add("frontier by law", row.estimate_ci95, true)
    return out


def below(held: Mapping[str, float], least: float, names: tuple[str, ...]) -> dict[str, float]:
    """Return the shares that are too small."""
    return {name: held[name] for name in names if held[name] < least}


def test_intervals_hold_the_truth() -> None:
    found = tally(Campaign(), 20, 50)
    assert below(found.held, 0.8, ("isoflop", "corrected", "parametric", "frontier", "frontier by law")) == {}
    assert below(found.held, 0.8, ("exponent isoflop", "exponent corrected", "exponent parametric")) == {}
    assert found.width["isoflop"] < 0.09
    assert found.width["frontier"] < 0.12


def test_a_wrong_law_neither_widens_nor_moves_what_the_losses_show() -> None:
    """The coupled law is fitted by the additive one, whose own frontier gain is wrong three times in four."""
    found = tally(Campaign(gamma=0.5), 8, 50)
    assert below(found.held, 0.75, ("isoflop", "corrected", "frontier")) == {}
    assert found.held["frontier by law"] < 0.5
    assert found.width["isoflop"] < 0.1


@pytest.mark.verify
@pytest.mark.parametrize(
    "campaign",
    [
        pytest.param(Campaign(), id="usual"),
        pytest.param(Campaign(noise=0.005), id="noisy"),
        pytest.param(Campaign(around=tuple(np.geomspace(0.6, 10, 9))), id="off centre"),
        pytest.param(Campaign(around=tuple(np.geomspace(0.4, 2.5, 6))), id="few sizes"),
        pytest.param(Campaign(budgets=tuple(np.geomspace(1e18, 1e20, 8)), noise=0.004), id="many budgets"),
        pytest.param(Campaign(gamma=0.5), id="coupled"),
    ],
)
def test_intervals_hold_the_truth_in_200_tables(campaign: Campaign) -> None:
    held = tally(campaign, 100, 200).held
    print({name: round(share, 3) for name, share in held.items()})
    names = BY_LOSSES if campaign.gamma != 1 else (*BY_LOSSES, *BY_LAW)
    assert below(held, 0.89, names) == {}
