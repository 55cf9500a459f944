"""The Frechet distance between two sets of embeddings, each taken for a Gaussian (Dowson and Landau 1982, eq. 16).

    FD = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))

The trace of (S1 S2)^(1/2) is the sum of the singular values of S1^(1/2) S2^(1/2), with the roots of S1 and S2 from
their symmetric eigenvalues. That is preferred to the usual `scipy.linalg.sqrtm(S1 @ S2)`: the product is not symmetric,
its root comes out complex or not at all where a covariance is singular, which it is whenever there are fewer samples
than dimensions, and the eigenvalues near zero of a product are known to half the digits only.

With n samples the distance is biased upwards by about 1/n, more for more dimensions (Chong and Forsyth 2020,
arXiv 1911.07023): two values are comparable only at equal n.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """Sums over a set that need not lie in memory: the sums of two sets together are those of both."""

    n: int
    """Samples."""
    mean: Doubles
    """(dimensions,)."""
    scatter: Doubles
    """(dimensions, dimensions): the summed outer products of what lies off the mean."""

    @classmethod
    def of(cls, samples: Floats) -> Moments:
        """The sums of samples (n, dimensions), n at least 1."""
        samples = samples.astype(np.float64)
        mean = samples.mean(axis=0)
        off = samples - mean
        return cls(len(samples), mean, off.T @ off)

    def __add__(self, other: Moments) -> Moments:
        """The sums of both sets together (Chan, Golub and LeVeque 1979, eq. 2.1), exact where plain sums cancel."""
        n = self.n + other.n
        apart = other.mean - self.mean
        mean = self.mean + apart * (other.n / n)
        between = np.outer(apart, apart) * (self.n * other.n / n)
        return Moments(n, mean, self.scatter + other.scatter + between)

    @property
    def covariance(self) -> Doubles:
        """Unbiased, (dimensions, dimensions); zero for a single sample."""
        return self.scatter / max(1, self.n - 1)

    @property
    def is_singular(self) -> bool:
        """Whether there are too few samples for a covariance of full rank, so that a distance says little."""
        return self.n <= len(self.mean)


def frechet_distance(one: Moments, other: Moments) -> float:
    """The Frechet distance of two sets of embeddings of equal dimension; symmetric, zero for a set and itself."""
    first, second = one.covariance, other.covariance
    overlap = np.linalg.svd(_root(first) @ _root(second), compute_uv=False).sum()
    apart = np.square(one.mean - other.mean).sum()
    # What lies below zero is rounding.
    return max(0.0, float(apart + np.trace(first) + np.trace(second) - 2 * overlap))


def _root(covariance: Doubles) -> Doubles:
    """The symmetric root of a covariance; eigenvalues that rounding cannot tell from zero are zero."""
    values, vectors = np.linalg.eigh(covariance)
    rounding = len(values) * np.finfo(np.float64).eps * np.abs(values).max()
    root: Doubles = (vectors * np.sqrt(np.where(values > rounding, values, 0.0))) @ vectors.T
    return root
