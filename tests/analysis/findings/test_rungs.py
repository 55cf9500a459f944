"""Rungs of equal compute: clusters of budgets that miss, none in a grid whose products fill the range."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.findings.rungs import near, rungs_of

SIZES = np.geomspace(1e7, 2e8, 9)


def missed(factor: float, off: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return log sizes and log FLOPs of five budgets, each missed by up to `off`."""
    target = np.repeat(1e18 * factor ** np.arange(5), len(SIZES))
    flops = target * np.random.default_rng(seed).uniform(1 - off, 1 + off, len(target))
    return np.log(np.tile(SIZES, 5)), np.log(flops)


@pytest.mark.parametrize(("factor", "off"), [(1.5, 0.0), (1.5, 0.08), (2.0, 0.1), (3.0, 0.15), (10.0, 0.2)])
def test_budgets_that_miss_their_target_are_one_rung_each(factor: float, off: float) -> None:
    for seed in range(5):
        rungs, method = rungs_of(*missed(factor, off, seed))
        assert method == "equal_flops"
        assert [len(rung.log_sizes) for rung in rungs] == [9] * 5
        assert [rung.log_flops for rung in rungs] == pytest.approx(
            np.log(1e18 * factor ** np.arange(5)), abs=off
        )


@pytest.mark.parametrize("points", [40, 240, 2000])
def test_a_continuum_of_budgets_has_no_rungs(points: int) -> None:
    for seed in range(10):
        rng = np.random.default_rng(seed)
        _, method = rungs_of(rng.uniform(16, 23, points), rng.uniform(40, 48, points))
        assert method == "interpolated"


@pytest.mark.parametrize("factor", [1.5, 1.8, 2.5])
def test_a_geometric_grid_of_sizes_and_lengths_is_no_isoflop_design(factor: float) -> None:
    sizes, tokens = 1e7 * factor ** np.arange(7), 1e8 * 2.0 ** np.arange(5)
    size, data = (values.ravel() for values in np.meshgrid(sizes, tokens))
    assert rungs_of(np.log(size), np.log(6 * size * data))[1] == "interpolated"


def test_a_grid_whose_products_coincide_holds_compute_equal() -> None:
    size, data = (
        values.ravel() for values in np.meshgrid(1e7 * 2.0 ** np.arange(7), 1e8 * 2.0 ** np.arange(5))
    )
    rungs, method = rungs_of(np.log(size), np.log(6 * size * data))
    assert method == "equal_flops"
    assert [len(rung.log_sizes) for rung in rungs] == [4, 5, 5, 5, 4]


def test_sizes_a_few_per_cent_apart_are_one_and_a_fine_series_is_not() -> None:
    assert near(np.log(np.array([2.03, 1.0, 1.02, 2.0]))).tolist() == [1, 0, 0, 1]
    groups = near(np.log(1.02 ** np.arange(100.0)))
    assert groups[-1] > 30  # each spans 5 %: neighbours do not chain
