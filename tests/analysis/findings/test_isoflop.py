"""The compute-optimal size: parabolas, their bias where they are off centre, the envelope, the law."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from analysis.findings.exponents import Exponent, power_law
from analysis.findings.isoflop import OptimalSizes, optima_notes, optimal_sizes
from analysis.points.table import CheckedPoints
from tests.analysis.conftest import checked, joined, noisy
from tests.analysis.findings.campaigns import TRANSFORMER as PUBLISHED
from tests.analysis.findings.campaigns import Campaign, plain
from tests.analysis.synthetic import TRANSFORMER, SyntheticStudy, loss_by

LAW = TRANSFORMER
EXPONENT = LAW["beta"] / (LAW["alpha"] + LAW["beta"])


def best_size(flops: float) -> float:
    """Hoffmann et al. 2022 (arXiv 2203.15556), equation 4."""
    ratio = (LAW["alpha"] * LAW["A"] / (LAW["beta"] * LAW["B"])) ** (1 / (LAW["alpha"] + LAW["beta"]))
    return ratio * (flops / 6) ** EXPONENT


def equal_flops(low: float, high: float, noise: float = 0.0) -> pd.DataFrame:
    """Seven sizes at each of five budgets, from `low` to `high` times the best one there."""
    rng = np.random.default_rng(0)
    rows = []
    for flops in np.geomspace(1e13, 1e16, 5):
        for size in np.geomspace(low, high, 7) * best_size(flops):
            tokens = flops / (6 * size)
            rows.append((size, tokens, flops, loss_by(LAW, size, tokens) * np.exp(rng.normal(0, noise))))
    return pd.DataFrame(rows, columns=["n_params", "tokens", "flops", "loss"]).assign(architecture="x")


def found_in(points: CheckedPoints) -> OptimalSizes:
    """Return the compute-optimal sizes that `fit` has of the first architecture, without the rest of the fit."""
    one = next(iter(joined(points).values()))
    return optimal_sizes(one.curve, noisy({one.fit.architecture: one}, 400)[one.fit.architecture])


def contains(exponent: Exponent, value: float) -> bool:
    return exponent.ci95 is not None and exponent.ci95[0] <= value <= exponent.ci95[1]


def test_a_parabola_about_the_minimum_finds_it() -> None:
    found = found_in(checked(equal_flops(1 / 3, 3)))
    assert found.method == "equal_flops"
    assert {one.standing for one in found.optima} == {"centred"}
    for one in found.optima:
        assert one.isoflop == pytest.approx(best_size(one.flops), rel=0.03)
    assert found.exponents["isoflop"].value == pytest.approx(EXPONENT, abs=0.005)


def test_an_off_centre_parabola_is_biased_without_noise_flagged_and_set_right() -> None:
    found = found_in(checked(equal_flops(1 / 1.3, 1000)))
    for one in found.optima:
        best = best_size(one.flops)
        assert one.standing == "off_centre"
        assert one.isoflop is not None
        assert abs(np.log(one.isoflop / best)) > 0.05
        assert one.bias == pytest.approx(one.isoflop / best, rel=0.01)
        assert (one.corrected, one.parametric) == pytest.approx((best, best), rel=0.01)


def test_a_minimum_outside_the_sizes_is_an_edge_and_no_estimate() -> None:
    found = found_in(checked(equal_flops(3, 30)))
    assert {one.standing for one in found.optima} == {"edge"}
    assert all(one.isoflop is one.corrected is one.envelope is None for one in found.optima)
    assert set(found.exponents) == {"parametric"}
    assert found.exponents["parametric"].value == pytest.approx(EXPONENT, abs=0.01)


def on_a_grid(noise: float) -> SyntheticStudy:
    return SyntheticStudy(
        laws={"cross_transformer": LAW},
        sizes=tuple(np.geomspace(2e4, 3e6, 8)),
        iterations=(100, 400, 1600, 6400, 25600),
        seeds=(1,) * 8,
        cluster_noise=noise,
        row_noise=noise,
    )


def test_on_a_grid_the_curves_are_interpolated_and_the_interpolation_corrected() -> None:
    found = found_in(checked(on_a_grid(0).table(0)))
    assert found.method == "interpolated"
    inside = [one for one in found.optima if one.corrected is not None]
    assert len(inside) >= 3
    for one in inside:
        assert one.corrected == pytest.approx(best_size(one.flops), rel=0.02)
    assert found.exponents["corrected"].value == pytest.approx(EXPONENT, abs=0.02)


def test_intervals_hold_the_estimate_and_the_truth() -> None:
    found = found_in(checked(equal_flops(1 / 4, 4, noise=0.002)))
    for name in ("corrected", "parametric"):
        one = found.exponents[name]
        assert contains(one, one.value)
        assert contains(one, EXPONENT)


def test_the_interval_is_of_the_same_exponent_where_flops_grow_slower_than_size() -> None:
    """Attention costs FLOPs that a small model spends as well: C is in proportion to (N + 5 sqrt(N N0)) D."""
    table = equal_flops(1 / 4, 4)
    size = table["n_params"]
    table["tokens"] = table["flops"] / (6 * (size + 5 * np.sqrt(size * size.max())))
    table["loss"] = loss_by(LAW, size, table["tokens"]) * np.exp(
        np.random.default_rng(0).normal(0, 0.002, len(table))
    )
    one = found_in(checked(table)).exponents["parametric"]
    assert abs(one.value - EXPONENT) > 0.05
    assert contains(one, one.value)


def test_an_optimum_far_outside_the_sizes_has_no_number_and_says_why() -> None:
    """Sizes far below the best ones: what the law would take lies ten thousand times beyond them."""
    found = found_in(checked(equal_flops(1e-5, 1e-4)))
    assert found.exponents == {}
    assert "0 of 5 budgets" in found.missing["parametric"]
    for one in found.optima:
        assert one.parametric is one.parametric_ci95 is one.parametric_beyond is None
        assert one.parametric_status == "not_identified"
        assert "10 times above the largest trained size" in one.reasons["parametric"]


def test_too_few_sizes_give_no_estimate_and_say_why() -> None:
    found = found_in(checked(SyntheticStudy(sizes=(1e5, 3e5, 1e6), seeds=(1, 1, 1)).table(0)))
    assert (found.method, found.optima, found.exponents) == (None, (), {})
    assert "4 trained sizes" in found.reason


def test_a_weighted_power_law_leans_on_what_is_known_well() -> None:
    x = np.array([1.0, 10.0, 100.0])
    y = 3.0 * x**0.5
    y[2] *= 2
    assert power_law(x, y, np.array([1e-3, 1e-3, 10.0]))[0] == pytest.approx(0.5, abs=1e-4)
    assert power_law(x[:2], y[:2]) == pytest.approx((0.5, 3.0))


def alone(**changes: object) -> Campaign:
    """Return a campaign of the transformer alone."""
    return Campaign(laws={"cross_transformer": PUBLISHED}, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("rate", [plain, None])
def test_budgets_missed_by_a_tenth_cost_nothing(rate: None) -> None:
    campaign = alone(noise=0.0) if rate is None else alone(noise=0.0, rate=rate)
    found = found_in(checked(campaign.table(0)))
    assert found.method == "equal_flops"
    assert [one.sizes for one in found.optima] == [9] * 5  # 1 and 1.02 times the best size are one
    for one in found.optima:
        best, _ = campaign.at_budget("cross_transformer", one.flops)
        assert one.isoflop == pytest.approx(best, rel=0.03)
        assert one.corrected == pytest.approx(best, rel=0.005)
        assert one.parametric == pytest.approx(best, rel=0.005)
    for name in ("isoflop", "corrected", "parametric"):
        assert found.exponents[name].value == pytest.approx(campaign.exponent("cross_transformer"), abs=0.004)


def test_many_sizes_about_the_best_leave_the_window_as_wide() -> None:
    """Ten sizes within 20 % of the best: three on each side would be a parabola of noise."""
    crowded = (*np.geomspace(0.25, 4, 9).tolist(), *np.geomspace(0.83, 1.2, 10).tolist())
    error = [
        np.log(one.isoflop / alone().at_budget("cross_transformer", one.flops)[0])
        for seed in range(4)
        for one in found_in(checked(alone(around=crowded).table(seed))).optima
        if one.isoflop is not None
    ]
    assert len(error) == 20
    assert np.sqrt(np.mean(np.square(error))) < 0.03


def test_a_correction_out_of_the_sampled_sizes_is_refused_with_its_reason() -> None:
    """One-sided sizes whose parabola has its minimum among them, while the law's lies below them."""
    found = found_in(checked(equal_flops(1.05, 1000)))
    refused = [one for one in found.optima if one.isoflop is not None and one.corrected is None]
    assert refused
    for one in refused:
        assert one.corrected_ci95 is None
        assert "leads below the smallest of 7 sampled sizes" in one.reasons["corrected"]


def test_no_size_is_given_outside_the_sampled_sizes_and_the_laws_says_how_far() -> None:
    found = found_in(checked(equal_flops(3, 30)))
    for one in found.optima:
        assert one.isoflop_ci95 is one.corrected_ci95 is None
        assert "the lowest loss is that of the smallest of 7 sizes" in one.reasons["isoflop"]
        assert one.parametric_status == "extrapolated"
        assert one.parametric_beyond == pytest.approx(3, rel=0.02)
        assert "3.0 times below the smallest size trained at this budget" in one.reasons["parametric"]
    assert found.exponents["parametric"].reason
    assert set(found.missing) == {"isoflop", "corrected", "envelope"}


def test_every_size_and_exponent_has_an_interval_or_its_reason() -> None:
    for around in ((0.25, 0.5, 1.0, 2.0, 4.0), (0.9, 1.4, 2.1, 3.3, 5.0), (0.3, 0.5, 0.7, 0.8)):
        found = found_in(checked(alone(around=around, noise=0.004).table(1)))
        for one in found.optima:
            for name in ("isoflop", "corrected", "parametric"):
                ends = getattr(one, f"{name}_ci95")
                assert (ends is None) == (
                    getattr(one, name) is None or "no interval" in one.reasons.get(name, "")
                )
                assert ends is None or ends[0] < ends[1]
                assert getattr(one, name) is not None or one.reasons[name]
        for name in ("isoflop", "corrected", "envelope", "parametric"):
            assert name in found.missing or found.exponents[name].ci95 or found.exponents[name].reason


def test_a_diverged_run_moves_no_optimum_and_is_named() -> None:
    table = alone().table(0)
    before = found_in(checked(table))
    table.loc[4, "loss"] *= 2.6
    after = found_in(checked(table))
    assert (before.left_out, after.left_out) == ((), ("run-4",))
    assert after.optima[0].isoflop == pytest.approx(before.optima[0].isoflop, rel=0.05)
    assert after.exponents["isoflop"].value == pytest.approx(before.exponents["isoflop"].value, abs=0.01)


def test_a_law_that_misses_the_minima_of_the_losses_is_named() -> None:
    """The size's exponent changes at the middle budget, which no single law follows."""
    campaign = alone(noise=0.0005)
    table = campaign.table(0)
    moved = table.copy()
    low = moved["flops"] < 5e18
    moved.loc[low, ["n_params", "tokens"]] *= [1.6, 1 / 1.6]
    found = {name: found_in(checked(one)) for name, one in (("true", table), ("moved", moved))}
    assert [note.code for note in optima_notes("x", found["true"])] == []
    (note,) = optima_notes("x", found["moved"])
    assert note.code == "optima_disagree"
    assert "of 5 budgets" in note.text
