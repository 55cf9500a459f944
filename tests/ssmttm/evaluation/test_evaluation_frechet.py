"""The Frechet distance of Gaussians has a closed form if the covariances commute."""

from __future__ import annotations

import numpy as np
import pytest

from ssmttm.evaluation.frechet import Moments, frechet_distance


def gaussian(mean: np.ndarray, covariance: np.ndarray) -> Moments:
    """Return a set of 101 samples with exactly these moments."""
    return Moments(101, np.asarray(mean, float), np.asarray(covariance, float) * 100)


def test_commuting_covariances_compare_axis_by_axis() -> None:
    axes = np.linalg.qr(np.random.default_rng(1).normal(size=(6, 6)))[0]
    first, second = np.arange(1.0, 7), np.array([4.0, 0, 9, 1, 0, 2])
    one = gaussian(np.zeros(6), axes * first @ axes.T)
    other = gaussian(np.ones(6), axes * second @ axes.T)
    expected = 6 + np.square(np.sqrt(first) - np.sqrt(second)).sum()
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-9)


def test_covariances_that_do_not_commute_agree_with_the_matrix_root() -> None:
    from scipy.linalg import sqrtm

    rng = np.random.default_rng(2)
    one, other = (Moments.of(rng.normal(size=(50, 4)) @ rng.normal(size=(4, 4))) for _ in range(2))
    root = np.trace(np.real(sqrtm(one.covariance @ other.covariance)))
    apart = np.square(one.mean - other.mean).sum()
    expected = apart + np.trace(one.covariance) + np.trace(other.covariance) - 2 * root
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-9)


def test_it_is_symmetric_and_zero_for_equal_sets_with_fewer_samples_than_dimensions() -> None:
    rng = np.random.default_rng(3)
    one, other = (Moments.of(rng.normal(size=(8, 32))) for _ in range(2))
    assert one.is_singular
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(one, other) == pytest.approx(frechet_distance(other, one), rel=1e-9)
    assert frechet_distance(one, other) > 1


def test_few_samples_of_one_distribution_seem_farther_apart_than_many() -> None:
    rng = np.random.default_rng(4)

    def apart(n: int) -> float:
        return frechet_distance(*(Moments.of(rng.normal(size=(n, 16))) for _ in range(2)))

    assert apart(32) > 4 * apart(512)


def test_sums_of_parts_are_those_of_the_whole_even_far_from_zero() -> None:
    samples = np.random.default_rng(5).normal(size=(90, 3)) + 1e6
    whole = Moments.of(samples)
    parts = Moments.of(samples[:1]) + Moments.of(samples[1:40]) + Moments.of(samples[40:])
    assert parts.n == whole.n
    assert np.allclose(parts.mean, whole.mean, rtol=1e-12)
    assert np.allclose(parts.covariance, whole.covariance, rtol=1e-6)
    assert np.allclose(whole.covariance, np.cov(samples.T), rtol=1e-6)
