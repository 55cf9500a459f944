"""The coupled law: what a larger model gains depends on its data, and the reverse.

L = E + ((A/N^alpha)^(1/gamma) + (B/D^beta)^(1/gamma))^gamma. With gamma = 1 it is the additive law of Hoffmann et al.
2022 (arXiv 2203.15556, equation 2); with gamma = beta and E = 0 it is that of Kaplan et al. 2020 (arXiv 2001.08361,
equation 1.5); with both free it contains both. A and B stand inside the inner power, so that A/N^alpha is
the reducible loss with unlimited data whatever gamma is: A keeps its meaning and its size as gamma moves, which
conditions the fit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from analysis.laws.law import Array, Law, no_bends, powers

TINY = 1e-30
COUPLING = (0.1, 3.0)
"""Bounds of gamma: below, the larger of the two terms alone counts; above, two terms cannot be told from one."""


@dataclass(frozen=True)
class CoupledLaw(Law):
    """E + (a^(1/gamma) + b^(1/gamma))^gamma of the two terms a = A/N^alpha and b = B/D^beta."""

    def predict(self, u: Array, z: Array) -> Array:
        """Return the loss in nats (problems, points) at solver parameters u (problems, parameters)."""
        return u[:, 0, None] + _joined(u, z)[0]

    def predict_with_jacobian(self, u: Array, z: Array) -> tuple[Array, Array]:
        """Return the loss (problems, points) and its derivative (problems, points, parameters)."""
        joined, of_size, of_data = _joined(u, z)
        A, B = (np.maximum(u[:, j, None], TINY) for j in (1, 2))
        by_size, by_data = joined * of_size, joined * of_data
        # d ln(joined) / d gamma is the entropy of the two shares.
        entropy = -sum(share * np.log(np.maximum(share, TINY)) for share in (of_size, of_data))
        columns = (
            np.ones_like(joined),
            by_size / A,
            by_data / B,
            -z[..., 0] * by_size,
            -z[..., 1] * by_data,
            joined * entropy,
        )
        return u[:, 0, None] + joined, np.stack(columns, axis=2)


@dataclass(frozen=True)
class KaplanLaw(CoupledLaw):
    """The coupled law with gamma = beta and without E; its parameters are A, B, alpha and beta."""

    def predict(self, u: Array, z: Array) -> Array:
        """Return the loss in nats (problems, points) at solver parameters u (problems, parameters)."""
        return super().predict(_whole(u), z)

    def predict_with_jacobian(self, u: Array, z: Array) -> tuple[Array, Array]:
        """Return the loss (problems, points) and its derivative (problems, points, parameters)."""
        loss, jacobian = super().predict_with_jacobian(_whole(u), z)
        jacobian[:, :, 4] += jacobian[:, :, 5]
        return loss, jacobian[:, :, 1:5]


def _whole(u: Array) -> Array:
    """Return parameters of Kaplan's law as those of the coupled one."""
    return np.column_stack([np.zeros(len(u)), u, u[:, 3]])


def _joined(u: Array, z: Array) -> tuple[Array, Array, Array]:
    """Return the two terms joined, and the shares of size and of data in the inner sum (problems, points)."""
    _, A, B, alpha, beta, gamma = (u[:, j, None] for j in range(6))
    size = np.log(np.maximum(A, TINY)) - alpha * z[..., 0]
    data = np.log(np.maximum(B, TINY)) - beta * z[..., 1]
    larger = np.maximum(size, data)
    smaller = np.exp(-np.abs(size - data) / gamma)
    joined = np.exp(np.clip(larger + gamma * np.log1p(smaller), -700.0, 700.0))
    share = 1.0 / (1.0 + smaller)
    first = size >= data
    return joined, np.where(first, share, 1.0 - share), np.where(first, 1.0 - share, share)


def coupled_law(name: str, simpler: Law) -> Law:
    """Return the law in which the two terms of `simpler`, a law of size and data, are coupled."""
    return CoupledLaw(
        name=name,
        formula=f"L = E + ((A/N^α)^(1/γ) + (B/{simpler.inputs[1].symbol}^β)^(1/γ))^γ",
        inputs=simpler.inputs,
        linear=simpler.linear,
        nonlinear=(*simpler.nonlinear, "gamma"),
        bounds=(*simpler.bounds, COUPLING),
        terms=lambda theta, z: powers(theta[:, :2], z),
        bends=no_bends,
        scaled=simpler.scaled,
        simpler=simpler,
        further={"gamma": (1.0, 0.3, 0.6, 1.8)},
    )


def kaplan_law(name: str, additive: Law) -> Law:
    """Return Kaplan's law of the inputs of `additive`, a law of size and data."""
    return KaplanLaw(
        name=name,
        formula="L = ((A/N^α)^(1/β) + (B/D^β)^(1/β))^β, no E",
        inputs=additive.inputs,
        linear=additive.linear[1:],
        nonlinear=additive.nonlinear,
        bounds=additive.bounds,
        terms=lambda theta, z: powers(theta, z)[:, :, 1:],
        bends=no_bends,
        scaled=additive.scaled,
    )
