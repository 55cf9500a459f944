"""The Frechet distance between two sets of embeddings, each taken for a Gaussian (Dowson and Landau 1982, eq. 16).

    FD = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))

The trace of (S1 S2)^(1/2) is the sum of the singular values of S1^(1/2) S2^(1/2), with the roots of S1 and S2 from
their symmetric eigenvalues. The usual `scipy.linalg.sqrtm(S1 @ S2)` is worse: the product is not symmetric, its root is
complex or fails if a covariance is singular (always with fewer samples than dimensions), and the eigenvalues of a
product near zero have half the digits.

With n samples the distance is biased upwards by about 1/n, more for more dimensions (Chong and Forsyth 2020,
arXiv 1911.07023): two values are comparable only at equal n.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """Sums over a set of samples, which need not be in memory: the sums of two sets add up to those of their union."""

    n: int
    """Samples."""
    mean: Doubles
    """(dimensions,)."""
    scatter: Doubles
    """(dimensions, dimensions): the summed outer products of the deviations from the mean."""

    @classmethod
    def of(cls, samples: Floats) -> Self:
        """Return the sums of samples (n, dimensions), n at least 1."""
        samples = samples.astype(np.float64)
        mean = samples.mean(axis=0)
        off = samples - mean
        return cls(len(samples), mean, off.T @ off)

    def __add__(self, other: "Moments") -> "Moments":
        """Return the sums of both sets together (Chan, Golub and LeVeque 1979, eq. 2.1), without cancellation."""
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
        """True if the samples are too few for a covariance of full rank, so that a distance means little."""
        return self.n <= len(self.mean)


def frechet_distance(one: Moments, other: Moments) -> float:
    """Return the Frechet distance of two sets of embeddings; symmetric, zero for a set and itself."""
    first, second = one.covariance, other.covariance
    overlap = np.linalg.svd(_root(first) @ _root(second), compute_uv=False).sum()
    apart = np.square(one.mean - other.mean).sum()
    # Values below zero are rounding.
    return max(0.0, float(apart + np.trace(first) + np.trace(second) - 2 * overlap))


def _root(covariance: Doubles) -> Doubles:
    """Return the symmetric root of a covariance; eigenvalues within rounding of zero count as zero."""
    values, vectors = np.linalg.eigh(covariance)
    rounding = len(values) * np.finfo(np.float64).eps * np.abs(values).max()
    root: Doubles = (vectors * np.sqrt(np.where(values > rounding, values, 0.0))) @ vectors.T
    return root
