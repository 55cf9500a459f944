"""The law whose exponent in D moves with N, as in arXiv 2506.10972 ("Farseer").

Farseer's loss is exp(a3 N^g + b3) + exp(a2 N^b + b2) D^-exp(a1 N^a + b1): size alone, and a power of the data whose
coefficient and exponent both move with size. The tens of runs of a study do not identify its nine parameters. This law
keeps the form, with E + A/N^alpha for the first term; the exponent of the second, and the logarithm of its coefficient,
are of first order in ln N:

    L = E + A/N^alpha + B / (N^eta D^(beta + kappa ln N))

With eta = kappa = 0 it is the additive law. The family is closed under a change of units, so that the solver may centre
its inputs; beta, eta and B depend on the units, and kappa does not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from analysis.laws.law import Array, Interval, Law

TILT: Interval = (-2.0, 2.0)
"""Bounds of eta, the exponent of size in the data term, at the centre of the points."""
MOTION: Interval = (-0.3, 0.3)
"""Bounds of kappa: an exponent of data moves by less over any real range of sizes."""


@dataclass(frozen=True)
class MovingLaw(Law):
    """The additive law with two further parameters, which the centre of the points moves with B and beta."""

    def _rescale(self, values: Array, centre: Array, sign: float) -> Array:
        out = super()._rescale(values, centre, sign)
        size, data = sign * centre
        _, _, B, _, beta, eta, kappa = values.T
        # ln B - eta (n - size) - beta (d - data) - kappa (n - size) (d - data), sorted by n, d and n d.
        out[:, 2] = B * np.exp(np.clip(eta * size + beta * data - kappa * size * data, -700.0, 700.0))
        out[:, 4] = beta - kappa * size
        out[:, 5] = eta - kappa * data
        return out


def _terms(theta: Array, z: Array) -> Array:
    alpha, beta, eta, kappa = (theta[:, j, None] for j in range(4))
    n, d = z[..., 0], z[..., 1]
    of_size = np.exp(np.clip(-alpha * n, -700.0, 700.0))
    of_data = np.exp(np.clip(-eta * n - (beta + kappa * n) * d, -700.0, 700.0))
    return np.stack([np.ones_like(of_size), of_size, of_data], axis=2)


def _bends(phi: Array, z: Array, coefficients: Array) -> Array:
    n, d = z[..., 0], z[..., 1]
    by_size = -coefficients[:, 1, None] * phi[:, :, 1]
    by_data = -coefficients[:, 2, None] * phi[:, :, 2]
    return np.stack([by_size * n, by_data * d, by_data * n, by_data * n * d], axis=2)


def moving_law(name: str, simpler: Law) -> Law:
    """Return the law in which the exponent in the data of `simpler`, a law of size and data, moves with size."""
    letter = simpler.inputs[1].symbol
    return MovingLaw(
        name=name,
        formula=f"L = E + A/N^α + B/(N^η {letter}^(β + κ ln N))",
        inputs=simpler.inputs,
        linear=simpler.linear,
        nonlinear=(*simpler.nonlinear, "eta", "kappa"),
        bounds=(*simpler.bounds, TILT, MOTION),
        terms=_terms,
        bends=_bends,
        scaled=simpler.scaled,
        simpler=simpler,
        further={"eta": (0.0, 0.1), "kappa": (0.0, 0.02)},
        unit_bound=("B", "beta", "eta"),
        without_size={"A": 0.0, "eta": 0.0, "kappa": 0.0},
    )
