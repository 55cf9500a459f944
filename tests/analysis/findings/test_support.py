"""A law is read where runs are near, in size and data together; a number beyond that is an extrapolation."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.findings.curve import Curve, Rung, rungs
from analysis.findings.equal_loss import compare_at, headline_of, size_ratios, token_gains
from analysis.findings.predict import asked, predict
from analysis.findings.support import Support
from analysis.laws.catalogue import CHINCHILLA
from analysis.laws.law import Array
from analysis.report.headlines import headlines
from tests.analysis.conftest import fit, true_curves
from tests.analysis.simulators import ARM, CAMPAIGNS, REFERENCE, SIZES, TOKENS, Campaign

GRID = np.array(
    [(size, tokens) for size in np.geomspace(1e7, 1e9, 5) for tokens in np.geomspace(1e8, 1e10, 5)]
)
TOGETHER = np.array([(size, 20 * size) for size in np.geomspace(1e7, 1e9, 5)])
CLUMPS = np.array([(1e7, 1e8), (2e7, 1e8), (5e8, 1e10), (1e9, 1e10)])


def support(points: Array) -> Support:
    return Support.of(points[:, 0], points[:, 1])


@pytest.mark.parametrize(
    ("points", "inside", "outside"),
    [
        (GRID, [(2e7, 3e8), (1e9, 1e10), (1.02e9, 1.02e10)], [(1.1e9, 1e9), (1e8, 9e7)]),
        (GRID[GRID.prod(axis=1) < 2e17], [(1e7, 1e10), (1e8, 1e9)], [(1e9, 1e10), (4e8, 4e9)]),
        (GRID[GRID[:, 0] == GRID[0, 0]], [(1e7, 5e8)], [(1.1e7, 5e8), (1e7, 2e10)]),
        (GRID[GRID[:, 1] == GRID[0, 1]], [(5e7, 1e8)], [(5e7, 1.1e8)]),
        (TOGETHER, [(5e7, 1e9)], [(5e7, 2e9), (2e9, 4e10)]),
        (GRID[:1], [(1e7, 1e8)], [(1.1e7, 1e8)]),
        (CLUMPS, [(1.5e7, 1e8), (9e8, 9.9e9)], [(1e8, 1e9)]),
    ],
    ids=["grid", "below one compute", "one size", "one budget", "in proportion", "one run", "two clumps"],
)
def test_the_support_is_the_hull_of_the_runs_as_far_as_a_run_is_near(
    points: Array, inside: list[tuple[float, float]], outside: list[tuple[float, float]]
) -> None:
    for at in inside:
        assert support(points).place(*at).inside, at
        assert support(points).place(*at).reason("the size", "it") == ""
    for at in outside:
        assert not support(points).place(*at).inside, at
        assert support(points).place(*at).reason("the size", "it")


def test_a_place_outside_the_support_says_how_far_in_size_in_data_and_in_compute() -> None:
    triangle = support(GRID[GRID.prod(axis=1) < 2e17])
    far = triangle.place(1e9, 1e10)
    assert far.compute == pytest.approx(100, rel=0.01)
    assert (far.size, far.data) == (pytest.approx(0.1, rel=0.01), pytest.approx(0.1, rel=0.01))
    assert (far.size_range, far.data_range) == (1.0, 1.0)
    assert "has both 1B parameters and this budget" in far.reason("the size", "it")
    assert "times smaller and 10 times shorter" in far.reason("the size", "it")
    assert "100 times the largest trained compute of it" in far.reason("the size", "it")
    assert "2.0 times above the largest trained size" in triangle.place(2e9, 1e8).reason("the size", "it")


def test_the_sizes_of_a_budget_are_those_of_the_hull_there() -> None:
    triangle = support(GRID[GRID.prod(axis=1) < 2e17])
    for tokens, largest in ((1e8, 1e9), (1e9, 1e8), (1e10, 1e7), (1e12, 1e7)):
        assert triangle.sizes_at(tokens) == (pytest.approx(1e7), pytest.approx(largest))
    assert triangle.data_at(1e8) == (pytest.approx(1e8), pytest.approx(1e9))
    assert support(TOGETHER).sizes_at(1e9) == (pytest.approx(5e7), pytest.approx(5e7))


def test_an_isoflop_ratio_is_identified_inside_the_bands_and_not_at_the_largest_size_and_most_tokens() -> (
    None
):
    campaign = CAMPAIGNS["isoflop"]
    curves = true_curves(campaign)
    frame = curves[REFERENCE].frame
    corner = Rung(float(frame["n_params"].max()), None, float(frame["tokens"].max()))
    row = compare_at(curves, REFERENCE, corner)[ARM].ratio
    assert (row.status, row.ratio) == ("extrapolated", None)
    assert "times the largest trained compute" in row.reason
    for budget in campaign.budgets:
        best = campaign.optimal_size(REFERENCE, budget)
        inside = compare_at(curves, REFERENCE, Rung(best, None, budget / (6 * best)))[ARM].ratio
        wanted = campaign.ratio(best, budget / (6 * best))
        supported = curves[ARM].support.place(best / wanted, budget / (6 * best)).inside
        assert inside.estimate == pytest.approx(wanted, rel=1e-6)
        assert inside.status == ("identified" if supported else "extrapolated")
    assert inside.status == "identified"


def test_every_trained_rung_is_a_row_and_many_are_thinned_evenly() -> None:
    for campaign in (CAMPAIGNS["one_seed"], CAMPAIGNS["isoflop"]):
        curves = true_curves(campaign)
        frame = curves[REFERENCE].frame
        trained = set(zip(frame["n_params"], frame["tokens"], strict=True))
        rows = [one.ratio for one in size_ratios(curves, REFERENCE)]
        assert {(row.reference_n_params, row.tokens) for row in rows} == trained
        assert len(token_gains(curves, REFERENCE)) == len(rows)
    sizes, tokens = (tuple(np.geomspace(values[0], values[-1], 30)) for values in (SIZES, TOKENS))
    grid = dict.fromkeys((REFERENCE, ARM), sizes)
    many = true_curves(Campaign(sizes=grid, tokens=dict.fromkeys(grid, tokens)))
    kept = rungs(many[REFERENCE], many)
    assert len(kept) == 96
    assert {(sizes[0], tokens[0]), (sizes[-1], tokens[-1])} <= {(one.n_params, one.tokens) for one in kept}
    logs = np.log([(one.n_params, one.tokens) for one in kept])
    for at in np.log([(size, count) for size in sizes for count in tokens]):
        assert np.abs(logs - at).max(axis=1).min() < np.log(sizes[-1] / sizes[0]) / 7


def test_the_headline_is_at_the_largest_compute_that_both_support_and_a_second_sentence_goes_beyond() -> None:
    """The arm needs 3 times the size of the reference, which its runs have at the smaller reference sizes alone."""
    usual = CAMPAIGNS["one_seed"]
    turned = Campaign(
        laws={REFERENCE: usual.laws[ARM], ARM: usual.laws[REFERENCE]}, series_noise=1e-6, row_noise=1e-6
    )
    document = fit(turned.table(0), reference=REFERENCE)
    row = headline_of(document.comparison.size_ratio, ARM)
    assert row is not None
    assert (row.status, row.tokens) == ("identified", pytest.approx(TOKENS[-1]))
    assert row.reference_n_params < SIZES[-1] / 2
    larger = [
        one for one in document.comparison.size_ratio if one.reference_n_params > row.reference_n_params
    ]
    assert all(one.status == "extrapolated" for one in larger if one.tokens == row.tokens)
    first, second = headlines(document)
    assert first.startswith("At 16B tokens, ssm reaches the loss of the")
    assert "extrapolation" not in first
    assert second.startswith("Beyond the support of the runs, at 16B tokens")
    assert "above the largest trained size of ssm" in second


def test_of_the_runs_of_one_budget_the_headline_is_the_one_with_the_lowest_loss() -> None:
    campaign = CAMPAIGNS["isoflop"]
    rows = [one.ratio for one in size_ratios(true_curves(campaign), REFERENCE)]
    row = headline_of(rows, ARM)
    assert row is not None
    best = campaign.optimal_size(REFERENCE, campaign.budgets[-1])
    assert 0.5 < row.reference_n_params / best < 2


def test_an_interval_that_spans_all_trained_sizes_identifies_nothing() -> None:
    curves = true_curves(CAMPAIGNS["one_seed"])
    arm, base = curves[ARM], curves[REFERENCE]
    at = Rung(SIZES[-1], None, TOKENS[-1])
    for spread, status in ((0.2, "identified"), (6.0, "not_identified")):
        factor = np.concatenate([[1.0], np.exp(spread * np.linspace(-1, 1, 40))])
        params = np.tile(arm.params, (41, 1))
        params[:, 1] *= (
            factor ** params[:, 3]
        )  # the size of each resample is this factor times that of the estimate
        wide = {
            ARM: Curve(CHINCHILLA, params, arm.frame),
            REFERENCE: Curve(CHINCHILLA, np.tile(base.params, (41, 1)), base.frame),
        }
        row = compare_at(wide, REFERENCE, at)[ARM].ratio
        assert row.status == status
        assert ("spans all trained sizes" in row.reason) == (status == "not_identified")


def test_an_end_of_an_interval_outside_the_support_is_said() -> None:
    curves = true_curves(CAMPAIGNS["one_seed"])
    for size, supported in ((SIZES[-1], True), (SIZES[2], False)):
        factor = np.concatenate([[1.0], np.geomspace(0.5, 2.0, 40)])
        params = np.tile(curves[ARM].params, (41, 1))
        params[:, 1] *= factor ** params[:, 3]
        base = np.tile(curves[REFERENCE].params, (41, 1))
        drawn = {
            ARM: Curve(CHINCHILLA, params, curves[ARM].frame),
            REFERENCE: Curve(CHINCHILLA, base, curves[REFERENCE].frame),
        }
        row = compare_at(drawn, REFERENCE, Rung(size, None, TOKENS[-1]))[ARM].ratio
        assert (row.status, row.ends_supported) == ("identified", supported)


def test_a_prediction_says_whether_the_runs_support_it() -> None:
    curve = true_curves(CAMPAIGNS["isoflop"])[REFERENCE]
    frame = curve.frame
    largest, most = frame["n_params"].max(), frame["tokens"].max()
    near = frame.iloc[0]
    asks = [
        asked(f"{size:.0f}:{tokens:.0f}tokens")
        for size, tokens in ((largest, most), (near["n_params"], near["tokens"]))
    ]
    beyond, inside = predict(curve, asks, np.zeros(len(frame)), 0)
    assert (beyond.size_factor, beyond.budget_factor) == (pytest.approx(1), pytest.approx(1))
    assert not beyond.in_support
    assert beyond.compute_factor == pytest.approx(largest * most * 6 / frame["flops"].max(), rel=1e-3)
    assert (inside.in_support, inside.compute_factor) == (True, 1.0)


def test_a_law_of_size_alone_is_supported_by_sizes_alone() -> None:
    table = CAMPAIGNS["one_seed"].table(0)
    table = table[table["tokens"] == table["tokens"].max()]
    document = fit(table, law="size", reference=REFERENCE)
    assert {row.status for row in document.comparison.size_ratio if row.reference_n_params > 2e8} == {
        "identified"
    }
