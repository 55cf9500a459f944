"""FLOPs a token by size: smooth and rising through all counts, and steady outside them."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.findings.flops import log_rate_of
from tests.analysis.findings.campaigns import attention, plain

SIZES = np.geomspace(1e7, 1e10, 12)


def slope(sizes: np.ndarray, rate: np.ndarray, at: float) -> float:
    """Return the local slope of the fitted curve at a size."""
    curve = log_rate_of(sizes, rate)
    ends = np.log(at) + np.array([-0.01, 0.01])
    return float(np.diff(curve(ends))[0] / 0.02)


@pytest.mark.parametrize("count", [plain, attention])
def test_exact_counts_are_met_inside_and_outside_the_sizes(count: object) -> None:
    assert callable(count)
    curve = log_rate_of(SIZES, count(SIZES))
    everywhere = np.geomspace(1e6, 1e11, 40)
    assert curve(np.log(everywhere)) == pytest.approx(np.log(count(everywhere)), abs=0.02)
    assert curve(np.log(SIZES)) == pytest.approx(np.log(count(SIZES)), abs=1e-4)


def test_the_last_two_sizes_do_not_decide_what_lies_beyond_them() -> None:
    """Two largest sizes of nearly the same N, 15 % apart in FLOPs: by those alone the slope is 7."""
    sizes = np.append(SIZES, SIZES[-1] * 1.02)
    rate = plain(sizes)
    rate[-1] *= 1.15
    curve = log_rate_of(sizes, rate)
    assert curve(np.log(np.array([1e11]))) == pytest.approx(np.log(6e11), abs=0.2)
    assert all(0.5 <= one <= 1.5 for one in curve.outside)


def test_scatter_of_equal_and_neighbouring_sizes_leaves_the_slope() -> None:
    rng = np.random.default_rng(0)
    sizes = np.repeat(SIZES, 3)
    worst = 0.0
    for _ in range(20):
        rate = plain(sizes) * np.exp(rng.normal(0, 0.05, len(sizes)))
        worst = max(worst, *(abs(slope(sizes, rate, at) - 1) for at in (1e7, 1e8, 1e9, 9e9)))
    assert worst < 0.15


def test_a_rate_never_falls_with_size() -> None:
    rng = np.random.default_rng(1)
    for _ in range(10):
        curve = log_rate_of(SIZES, 1e9 * np.exp(rng.normal(0, 0.5, len(SIZES))))
        assert (np.diff(curve(np.linspace(10, 30, 400))) >= -1e-12).all()


def test_one_size_gives_flops_in_proportion_to_size() -> None:
    curve = log_rate_of(np.array([1e8, 1e8]), np.array([6e8, 6e8]))
    assert curve(np.log(np.array([1e7, 1e9]))) == pytest.approx(np.log(np.array([6e7, 6e9])))
