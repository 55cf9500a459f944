"""The next step is the best by a known law, and its predicted loss is compared with the loss seen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis.design.scale_up import ScaleUp, next_step, seen_since
from analysis.errors import InputError
from analysis.points.table import CheckedPoints
from tests.analysis.conftest import checked
from tests.analysis.synthetic import TOKENS_AN_ITERATION, TRANSFORMER, SyntheticStudy, loss_by

SIZES = tuple(np.geomspace(1e5, 3e6, 5))
STUDY = SyntheticStudy(sizes=SIZES, seeds=(2,) * 5, cluster_noise=0.001, row_noise=0.001)
RATES = {name: {size: size * 1e-10 for size in STUDY.sizes} for name in STUDY.laws}
BUDGET = 8.0


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return STUDY.table(3)


@pytest.fixture(scope="module")
def points(table: pd.DataFrame) -> CheckedPoints:
    return checked(table)


@pytest.fixture(scope="module")
def proposed(points: CheckedPoints) -> ScaleUp:
    return next_step(points, RATES, BUDGET)


def test_the_step_is_the_best_its_law_knows_and_spends_its_share(proposed: ScaleUp) -> None:
    """At equal cost C = k N T the optimum of A/N^a + B/D^b has a A/N^a = b B/D^b (arXiv 2203.15556, equation 4)."""
    law = TRANSFORMER
    (step,) = [one for one in proposed.steps if one.architecture == "cross_transformer"]
    share = BUDGET / 2
    sizes = np.geomspace(1e5, 1e9, 20_000)
    tokens = share / (sizes * 1e-10) * TOKENS_AN_ITERATION
    slope = law["alpha"] * law["A"] / sizes ** law["alpha"] - law["beta"] * law["B"] / tokens ** law["beta"]
    best = sizes[np.argmin(np.abs(slope))]
    assert step.n_params_ci95[0] <= best <= step.n_params_ci95[1]
    assert step.n_params == pytest.approx(best, rel=0.5)
    assert 0.9 * share <= step.gpu_hours <= share * (1 + 1e-9)
    assert step.gpu_hours == pytest.approx(step.n_params * 1e-10 * step.iterations, rel=1e-6)
    assert step.loss == pytest.approx(loss_by(law, step.n_params, step.tokens), rel=0.01)
    assert step.run95 is not None
    assert step.run95[0] < step.loss < step.run95[1]


def test_runs_finished_since_are_compared_with_the_law_of_the_proposal(
    table: pd.DataFrame, proposed: ScaleUp
) -> None:
    assert seen_since(checked(table), proposed) == []
    further = replace(STUDY, sizes=(12e6, 1e6), iterations=(1600, 3200), seeds=(1, 1)).table(9)
    further = further.assign(run_id="new-" + further["run_id"], cluster="new-" + further["cluster"])
    seen = seen_since(checked(pd.concat([table, further])), proposed)
    # 12M at both budgets and 1M at twice the longest; 1M at a former budget lies in the range of the law.
    assert len(seen) == 2 * 3
    assert max(abs(one.relative_error) for one in seen) < 0.02
    assert sum(bool(one.inside) for one in seen) >= 5
    with pytest.raises(InputError, match=f"none of the {len(table)} runs from which it was made"):
        seen_since(checked(further), proposed)
    off = further.assign(loss=further["loss"] * 1.2)
    missed = seen_since(checked(pd.concat([table, off])), proposed)
    assert not any(one.inside for one in missed)
    assert all(one.relative_error == pytest.approx(-1 / 6, abs=0.02) for one in missed)


def test_a_budget_and_points_that_do_not_serve_are_refused(
    points: CheckedPoints, table: pd.DataFrame
) -> None:
    timeless = checked(table.drop(columns="iterations"))
    for said, own, rates, budget, law in (
        ("too few at every size for the 1 iterations", points, RATES, 1e-12, "chinchilla"),
        ("--budget -1", points, RATES, -1.0, "chinchilla"),
        ("costs for 0 sizes", points, {}, 1.0, "chinchilla"),
        ("some points have none", timeless, RATES, 1.0, "chinchilla"),
        ("--law data", points, RATES, 1.0, "data"),
    ):
        with pytest.raises(InputError, match=said):
            next_step(own, rates, budget, law=law)
    assert {"within_range"} <= {note.code for note in next_step(points, RATES, 0.02).notes}


@pytest.mark.parametrize(
    ("factor", "advice"), [(1e-4, "give a larger budget"), (1e4, "take a smaller step first")]
)
def test_far_from_the_trained_range_a_note_says_how_to_come_closer(
    points: CheckedPoints, factor: float, advice: str
) -> None:
    notes = next_step(points, RATES, factor * BUDGET).notes
    far = [note.text for note in notes if note.code == "extrapolation_ratio"]
    assert len(far) == 2
    assert all(advice in text for text in far)


@pytest.mark.parametrize("budget", [1.02, 2.0, 20.0])
def test_no_run_is_proposed_that_is_shorter_than_the_shortest(points: CheckedPoints, budget: float) -> None:
    """A budget too small for the best size pays for a smaller size, or for nothing."""
    shortest: dict[str, Any] = {"shortest": 125, "shortest_because": "training.schedule.warmup is 100"}
    # The cost of the smallest size that is tried, at which 125 iterations are no round number.
    least = 2 * 125 * min(STUDY.sizes) / 300 * 1e-10
    for share in (0.02, 1.02 * budget * least):
        for step in next_step(points, RATES, share, **shortest).steps:
            assert step.iterations >= 125
            assert step.gpu_hours <= share / 2 * (1 + 1e-9)
    with pytest.raises(
        InputError, match=r"125 iterations of the shortest run \(training.schedule.warmup is 100\)"
    ):
        next_step(points, RATES, 0.9 * least, **shortest)


def test_a_size_timed_as_cheaper_than_a_smaller_one_makes_no_size_free(points: CheckedPoints) -> None:
    *_, second, largest = STUDY.sizes
    rates = {name: RATES[name] | {largest: 0.95 * RATES[name][second]} for name in RATES}
    for step in next_step(points, rates, BUDGET).steps:
        assert step.size_factor < 10
        low, high = step.n_params_ci95
        assert high / low > 1.1
    # Beyond the largest the cost is in proportion to size.
    large = next_step(points, rates, 100 * BUDGET).steps[0]
    cost = rates["cross_transformer"][second] * large.n_params / largest
    assert large.gpu_hours == pytest.approx(cost * large.iterations, rel=1e-3)


def test_the_best_size_is_not_drawn_to_the_sizes_whose_cost_is_known(points: CheckedPoints) -> None:
    """A launch costs the same at every size: between the sizes known the cost bends, and at them it has no corner."""
    rates = {name: {size: (size + 3e5) * 1e-10 for size in STUDY.sizes} for name in RATES}
    ends = [
        step.n_params_ci95
        for budget in np.geomspace(0.1, 0.5, 4)
        for step in next_step(points, rates, float(budget)).steps
    ]
    assert min(high / low for low, high in ends) > 1.01


def test_a_law_without_an_effect_of_size_is_noted(table: pd.DataFrame) -> None:
    flat = table.assign(loss=2.0 + 30 / table["iterations"] ** 0.7 + 1e-3 * np.sin(np.arange(len(table))))
    codes = {note.code for note in next_step(checked(flat), RATES, BUDGET).notes}
    assert {"no_size_effect", "optimum_vague"} <= codes
