"""Resamples: whole series, the same draw for both architectures, intervals that cover."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pandas as pd
import pytest

from analysis.findings.document import fit_points
from analysis.findings.results import FitDocument
from analysis.fitting import bootstrap
from analysis.fitting.bootstrap import WEBB, Scheme, affordable, interval, noisy_losses, resample
from analysis.fitting.profile import profile
from analysis.points.table import CheckedPoints
from tests.analysis.conftest import checked, compared, fit, fitted, note_codes
from tests.analysis.synthetic import SIMBA, WIDE, SyntheticStudy, loss_by


def test_webbs_weights_have_mean_zero_and_variance_one() -> None:
    assert WEBB.mean() == pytest.approx(0, abs=1e-15)
    assert (WEBB**2).mean() == pytest.approx(1, abs=1e-12)


def test_few_series_take_a_mixed_model_and_many_are_drawn_whole(points: CheckedPoints) -> None:
    many = SyntheticStudy(sizes=tuple(np.geomspace(1e5, 1e7, 50)), seeds=(2,) * 50)
    for own, scheme in ((points, "mixed"), (checked(many.table(0)), "cluster")):
        assert resample([fitted(own)], 100, 0).scheme == scheme


def test_points_taken_mid_run_take_the_wild_bootstrap() -> None:
    """Their errors drift along the run, which no shift of the series describes."""
    table = SyntheticStudy(iterations=tuple(range(100, 2100, 100)), row_noise=1e-4).table(0)
    drift = np.random.default_rng(0).normal(0, 0.002, len(table))
    table["loss"] *= np.exp(drift.reshape(-1, 20).cumsum(axis=1).ravel())
    document = fit(table)
    assert document.resampling.scheme == "wild"
    assert "wild_bootstrap" in note_codes(document)


def test_the_same_seed_gives_the_same_resamples_and_another_seed_others(points: CheckedPoints) -> None:
    own = fitted(points)
    first, again, other = (resample([own], 100, seed).params["prefix_simba"] for seed in (4, 4, 5))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)


@pytest.mark.parametrize("study", [SyntheticStudy(), WIDE], ids=["few", "more"])
def test_twins_are_resampled_alike_so_that_their_ratio_is_one_throughout(study: SyntheticStudy) -> None:
    """Two architectures with the same losses: unpaired resamples would give their ratio an interval."""
    table = study.table(0)
    one = table[table["architecture"] == "prefix_simba"]
    twin = one.assign(architecture="twin", run_id="twin" + one["run_id"], cluster="twin" + one["cluster"])
    both = one.assign(architecture="cross_transformer")
    comparison = compared(pd.concat([both, twin]))
    assert comparison.paired
    for row in comparison.size_ratio:
        assert row.estimate == pytest.approx(1, rel=1e-6)
        assert row.estimate_ci95 == pytest.approx((1, 1), rel=1e-3)


def test_rows_of_one_series_are_not_counted_as_independent() -> None:
    """With noise between series only, rows resampled alone would halve the interval."""
    table = SyntheticStudy(
        sizes=tuple(np.geomspace(1e5, 1e7, 12)), seeds=(1,) * 12, cluster_noise=0.01, row_noise=0.0
    ).table(0)
    series, rows = (
        interval(resample([fitted(checked(one))], 300, 0).params["prefix_simba"][:, 3])
        for one in (table, table.assign(cluster=table["run_id"]))
    )
    assert series[1] - series[0] > 1.3 * (rows[1] - rows[0])


def test_the_interval_holds_the_estimate(document: FitDocument) -> None:
    for one in document.architectures.values():
        for name, (low, high) in one.ci95.items():
            assert low <= one.params[name] <= high


def test_a_profile_is_lowest_at_the_estimate_and_closes_where_points_are_many() -> None:
    one = fitted(checked(WIDE.table(1)))
    curve = profile(one.problem, one.result, "alpha")
    at = int(np.argmin(curve.objective))
    assert curve.values[at] == pytest.approx(one.result.params["alpha"], rel=0.02)
    assert curve.objective[at] >= one.result.objective * (1 - 1e-6)
    low, high = curve.interval
    assert low is not None
    assert high is not None
    assert low < one.result.params["alpha"] < high


def test_a_profile_of_what_the_points_cannot_tell_stays_open() -> None:
    one = fitted(checked(SyntheticStudy(iterations=(400,)).table(0)))
    assert None in profile(one.problem, one.result, "beta").interval


def many(rows: int, clusters: int = 24) -> pd.DataFrame:
    """So many points of one architecture in series of one size and seed each, at other tokens each."""
    number = np.arange(rows) % clusters
    size, tokens = 1e5 * 3.0 ** (number % 6), 1e6 * (1.0 + np.arange(rows) // clusters)
    noise = np.random.default_rng(0).normal(0, 0.003, rows)
    loss = loss_by(SIMBA, size, tokens) * np.exp(noise)
    columns = {
        "n_params": size,
        "tokens": tokens,
        "loss": loss,
        "cluster": number.astype(str),
        "seed": number // 6,
    }
    return pd.DataFrame(columns).assign(architecture="prefix_simba")


@pytest.mark.parametrize("scheme", ["cluster", "mixed", "wild"])
def test_the_memory_of_refits_does_not_grow_with_their_number(scheme: Scheme) -> None:
    own, peaks = fitted(checked(many(4000))), []
    for count in (100, 500):
        tracemalloc.start()
        resample([own], count, 0, scheme)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 400 * 4000 * 8 / 4  # a quarter of the further log losses alone


def test_the_leverage_of_a_large_series_is_that_of_its_few_directions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = fitted(checked(many(200, clusters=12)))
    whole = noisy_losses(own, resample([own], 20, 0, "wild"), 20)
    monkeypatch.setattr(bootstrap, "LARGE_CLUSTER", 5)
    again = noisy_losses(own, resample([own], 20, 0, "wild"), 20)
    np.testing.assert_allclose(again, whole, rtol=1e-9)


def test_very_many_points_have_fewer_resamples_and_a_note_says_so(
    points: CheckedPoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert affordable(20_000) == 1000
    assert affordable(10**9) == 100
    monkeypatch.setattr(bootstrap, "WORK", 120 * len(points.frame))
    document = fit_points(points)
    assert document.resampling.resamples == 120
    (note,) = [note for note in document.notes if note.code == "fewer_resamples"]
    assert note.text.endswith("120 resamples were made in place of 1000.")
    assert fit_points(points, resamples=150).resampling.resamples == 150
