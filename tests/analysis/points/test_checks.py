"""The two checks on training, computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.points.checks import pooled_sd, seed_noise, trend_checks
from tests.analysis.conftest import checked
from tests.analysis.synthetic import SyntheticStudy


def test_differences_and_seed_deviation_are_those_of_the_losses() -> None:
    table = SyntheticStudy().table(0)
    own = table[table["architecture"] == "prefix_simba"]
    frame = checked(table).of("prefix_simba")
    size, budget = trend_checks("prefix_simba", frame)

    def loss(n_params: float, iterations: int) -> np.ndarray:
        return own[(own["n_params"] == n_params) & (own["iterations"] == iterations)]["loss"].to_numpy()

    sd = float(np.sqrt(np.mean([loss(1e5, count).var(ddof=1) for count in (400, 800, 1600)])))
    assert pooled_sd(seed_noise(frame)) == pytest.approx(sd)
    assert [item.seeds for item in seed_noise(frame)] == [3, 3, 3]
    assert size.difference == pytest.approx(loss(1e5, 1600).mean() - loss(3e6, 1600)[0])
    assert budget.difference == pytest.approx(loss(3e6, 400)[0] - loss(3e6, 1600)[0])
    assert size.ratio == pytest.approx(size.difference / sd)
    assert (size.passed, budget.passed) == (True, True)


@pytest.mark.parametrize(("edge", "passed"), [(1.9, False), (2.1, True), (-3.0, False)])
def test_a_difference_passes_above_two_seed_deviations_and_not_below(edge: float, passed: bool) -> None:
    table = SyntheticStudy().table(0)
    table = table[table["architecture"] == "prefix_simba"].reset_index(drop=True)
    table["loss"] = 3.0
    smallest = table["n_params"] == 1e5
    table.loc[smallest, "loss"] += table.loc[smallest, "seed"].map({0: -0.01, 1: 0.0, 2: 0.01})
    table.loc[table["n_params"] == 3e6, "loss"] -= edge * 0.01
    size, budget = trend_checks("prefix_simba", checked(table).of("prefix_simba"))
    assert size.seed_sd == pytest.approx(0.01)
    assert size.ratio == pytest.approx(edge)
    assert size.passed is passed
    assert budget.difference == 0.0
    assert budget.passed is False


def test_without_seeds_the_checks_are_unknown_and_not_passed() -> None:
    table = SyntheticStudy(seeds=(1, 1, 1, 1)).table(0)
    for check in trend_checks("prefix_simba", checked(table).of("prefix_simba")):
        assert (check.seed_sd, check.ratio, check.passed) == (None, None, None)
        assert check.difference > 0
