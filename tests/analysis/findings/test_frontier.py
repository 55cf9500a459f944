"""Compute gain along the frontier: each architecture at its own compute-optimal size, judged by what was trained."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from analysis.findings.curve import Curve
from analysis.findings.frontier import FrontierGain, frontier_gains
from analysis.laws.catalogue import law_named
from analysis.laws.law import Law
from analysis.report.tables import print_fit
from tests.analysis.conftest import checked, fit, joined, noisy
from tests.analysis.findings.campaigns import SSM, TRANSFORMER, Campaign
from tests.analysis.synthetic import TOKENS_AN_ITERATION

BASE, ARM = "cross_transformer", "ssm"
CAMPAIGN = Campaign()
EXACT = Campaign(noise=1e-5)


def gains(table: pd.DataFrame, resamples: int = 50, law: str = "chinchilla") -> list[FrontierGain]:
    """Return the frontier gains that `fit` has over the transformer."""
    form: Law = law_named(law)
    fits = joined(checked(table), resamples, form)
    curves = {name: one.curve for name, one in fits.items()}
    return frontier_gains(curves, BASE, noisy(fits, 200))


def test_the_gain_is_the_known_one_at_every_trained_budget() -> None:
    found = gains(EXACT.table(0))
    assert [row.reference_flops for row in found] == pytest.approx(CAMPAIGN.budgets[::-1], rel=0.1)
    for row in found:
        true = CAMPAIGN.gain(ARM, BASE, row.reference_flops)
        best, loss = CAMPAIGN.at_budget(BASE, row.reference_flops)
        assert row.estimate == pytest.approx(true, rel=0.01)
        assert (row.reference_n_params, row.loss) == pytest.approx((best, loss), rel=0.01)
        assert row.flops == pytest.approx(row.reference_flops / true, rel=0.01)
        assert row.n_params == pytest.approx(CAMPAIGN.at_budget(ARM, row.flops)[0], rel=0.01)


def test_it_is_identified_only_where_both_optima_lie_among_the_runs() -> None:
    """At the least budget of the transformer the other needs a third of the compute, which no run of it had."""
    *inside, least = gains(EXACT.table(0))
    assert {row.status for row in inside} == {"identified"}
    assert all((row.gain, row.ci95, row.by) == (row.observed, row.observed_ci95, "losses") for row in inside)
    assert [row.gain for row in inside] == pytest.approx([row.estimate for row in inside], rel=0.01)
    assert (least.status, least.gain, least.ci95, least.observed) == ("extrapolated", None, None, None)
    assert least.reason == "the compute is 2.6 times below the least of ssm"


def test_an_optimal_size_outside_those_trained_at_its_budget_is_extrapolated() -> None:
    """Sizes of all budgets together span the optimum, but at each budget all are more than twice as large."""
    large = Campaign(noise=1e-5, around=tuple(np.geomspace(2.5, 20, 7)))
    table = EXACT.table(0)
    other = large.table(0)
    mixed = pd.concat([table[table["architecture"] == BASE], other[other["architecture"] == ARM]])
    row = gains(mixed)[0]
    assert (row.status, row.gain) == ("extrapolated", None)
    assert "the optimal size is 2." in row.reason
    assert "below those trained with such compute of ssm" in row.reason


def test_two_equal_architectures_have_a_gain_of_one() -> None:
    same = Campaign(laws={BASE: TRANSFORMER, "other": TRANSFORMER})
    row = gains(same.table(3), 100)[1]
    assert row.ci95 is not None
    assert row.ci95[0] < 1 < row.ci95[1]


def test_a_law_in_iterations_gives_the_same_gain_as_in_tokens() -> None:
    table = EXACT.table(0)
    table["iterations"] = table["tokens"] / TOKENS_AN_ITERATION
    by_tokens, by_iterations = (gains(table, 20, law) for law in ("chinchilla", "chinchilla_iterations"))
    for one, other in zip(by_tokens, by_iterations, strict=True):
        assert other.estimate == pytest.approx(one.estimate, rel=1e-3)
        assert other.status == one.status


def test_flops_are_counted_alike_for_all_architectures() -> None:
    table = EXACT.table(0)
    assert {row.flop_convention for row in gains(table, 20)} == {"flops"}
    table.loc[table["architecture"] == ARM, "flops"] = np.nan
    assert {row.flop_convention for row in gains(table, 20)} == {"6 n_params tokens"}


def test_no_gain_where_no_compute_reaches_the_loss_or_a_law_has_no_trade_off() -> None:
    table = EXACT.table(0)
    table.loc[table["architecture"] == ARM, "loss"] += 3.0
    for row in gains(table, 20):
        assert (row.status, row.gain, row.estimate, row.flops) == ("not_identified", None, None, None)
        assert "100 times more than trained" in row.reason
    assert gains(EXACT.table(0), 20, "size") == []


def test_a_grid_without_minima_at_equal_compute_has_the_gain_of_the_law() -> None:
    """Three sizes at each budget show no minimum."""
    few = Campaign(noise=1e-5, around=(0.5, 1.0, 2.0))
    rows = [row for row in gains(few.table(0)) if row.status == "identified"]
    assert rows
    for row in rows:
        assert (row.by, row.observed, row.observed_ci95) == ("law", None, None)
        assert row.gain == row.estimate == pytest.approx(few.gain(ARM, BASE, row.reference_flops), rel=0.01)


def test_an_unidentified_law_has_no_frontier_gain() -> None:
    curves = {name: one.curve for name, one in joined(checked(EXACT.table(0)), 20).items()}
    curves[ARM] = replace(curves[ARM], unidentified_because="its size has no effect")
    assert isinstance(curves[ARM], Curve)
    assert {(row.status, row.reason) for row in frontier_gains(curves, BASE)} == {
        ("not_identified", "its size has no effect")
    }


def test_the_terminal_prints_the_gains_in_compute() -> None:
    table = Campaign(budgets=(1e18, 1e19, 1e20), laws={BASE: TRANSFORMER, ARM: SSM}).table(0)
    document = fit(table)
    out = StringIO()
    print_fit(Console(file=out, width=200), checked(table), document)
    text = out.getvalue()
    (row, *_) = document.comparison.frontier_gain
    assert f"frontier gain over {BASE}" in text
    assert row.observed is not None
    assert f"{row.observed:.2f}" in text
    assert f"{row.estimate:.2f}" in text
    assert f"compute gain over {BASE}" in text
    assert f"{document.comparison.compute_gain[0].gain:.2f}" in text
