"""The parametric laws of the loss, each a sum of linear coefficients times a basis with an analytic Jacobian.

Writing a law as `loss = sum_k c_k phi_k(x; theta)` lets one solver project the linear coefficients out and
lets every law share one Jacobian rule. Inputs are centred on their geometric means inside the solver, where
A N^-alpha becomes A' exp(-alpha (ln N - ln N0)): without it A and alpha are correlated to the last digit.
Arrays carry a leading axis of problems (resamples), so that a thousand refits are one call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.errors import InputError

Array = NDArray[np.float64]
Terms = Callable[[Array, Array], Array]
Bends = Callable[[Array, Array, Array], Array]

EXPONENT = (0.01, 3.0)
REPEATS = (0.05, 1e4)


@dataclass(frozen=True)
class Law:
    """One parametric form: `inputs` name the columns of x, `linear` the coefficients, `nonlinear` the rest.

    `terms(theta, z)` takes theta (problems, nonlinear) and z, the centred logarithms, (points, inputs) or a set of
    points for each problem (problems, points, inputs), and returns phi (problems, points, linear). `bends(phi, z, c)`
    is the derivative of the loss by the nonlinear parameters (problems, points, nonlinear) at coefficients c
    (problems, linear). `scaled` maps a coefficient to the (input, exponent) whose centring it absorbs.
    """

    name: str
    formula: str
    inputs: tuple[str, ...]
    linear: tuple[str, ...]
    nonlinear: tuple[str, ...]
    bounds: tuple[tuple[float, float], ...]
    terms: Terms
    bends: Bends
    scaled: Mapping[str, tuple[str, str]]

    @property
    def names(self) -> tuple[str, ...]:
        """Every parameter, linear ones first: the order of the solver's columns."""
        return (*self.linear, *self.nonlinear)

    def predict(self, u: Array, z: Array) -> Array:
        """Loss in nats (problems, points) at solver parameters u (problems, parameters)."""
        k = len(self.linear)
        loss: Array = (self.terms(u[:, k:], z) @ u[:, :k, None])[:, :, 0]
        return loss

    def predict_with_jacobian(self, u: Array, z: Array) -> tuple[Array, Array]:
        """Loss (problems, points) and its derivative (problems, points, parameters)."""
        k = len(self.linear)
        phi = self.terms(u[:, k:], z)
        loss: Array = (phi @ u[:, :k, None])[:, :, 0]
        return loss, np.concatenate([phi, self.bends(phi, z, u[:, :k])], axis=2)

    def centred(self, x: Array, centre: Array) -> Array:
        """Logarithms of x (points, inputs) about `centre` (inputs)."""
        return np.log(x) - centre

    def to_public(self, u: Array, centre: Array) -> Array:
        """Solver parameters (problems, parameters) -> the law's own, in the units of x; raises nothing."""
        return self._rescale(u, centre, +1.0)

    def to_solver(self, public: Array, centre: Array) -> Array:
        """The inverse of `to_public`."""
        return self._rescale(public, centre, -1.0)

    def _rescale(self, values: Array, centre: Array, sign: float) -> Array:
        out = np.array(values, dtype=np.float64)
        for coefficient, (column, exponent) in self.scaled.items():
            shift = centre[self.inputs.index(column)]
            power = values[:, self.names.index(exponent)]
            out[:, self.names.index(coefficient)] *= np.exp(np.clip(sign * power * shift, -700.0, 700.0))
        return out


def _powers(theta: Array, z: Array) -> Array:
    """1 and exp(-theta_j z_j) for each input: a constant and one power law an input."""
    count = theta.shape[1]
    shape = (len(theta), z.shape[-2])
    terms = [np.broadcast_to(np.exp(-theta[:, j, None] * z[..., j]), shape) for j in range(count)]
    return np.stack([np.ones(shape), *terms], axis=2)


def _power_bends(phi: Array, z: Array, coefficients: Array) -> Array:
    each = [-z[..., j] * phi[:, :, j + 1] * coefficients[:, None, j + 1] for j in range(phi.shape[2] - 1)]
    return np.stack(each, axis=2)


def _two(name: str, formula: str, data: str) -> Law:
    return Law(
        name=name,
        formula=formula,
        inputs=("n_params", data),
        linear=("E", "A", "B"),
        nonlinear=("alpha", "beta"),
        bounds=(EXPONENT, EXPONENT),
        terms=_powers,
        bends=_power_bends,
        scaled={"A": ("n_params", "alpha"), "B": (data, "beta")},
    )


def _one(name: str, formula: str, column: str, coefficient: str, exponent: str) -> Law:
    return Law(
        name=name,
        formula=formula,
        inputs=(column,),
        linear=("E", coefficient),
        nonlinear=(exponent,),
        bounds=(EXPONENT,),
        terms=_powers,
        bends=_power_bends,
        scaled={coefficient: (column, exponent)},
    )


# Hoffmann et al. 2022 (arXiv 2203.15556), equation 2.
CHINCHILLA = _two("chinchilla", "L = E + A/N^α + B/D^β, D in tokens", "tokens")
CHINCHILLA_ITERATIONS = _two("chinchilla_iterations", "L = E + A/N^α + B/T^β, T in iterations", "iterations")
# Kaplan et al. 2020 (arXiv 2001.08361), section 3, with an offset E.
SIZE = _one("size", "L = E + A/N^α", "n_params", "A", "alpha")
DATA = _one("data", "L = E + B/D^β, D in tokens", "tokens", "B", "beta")

LAWS: Mapping[str, Law] = {law.name: law for law in (CHINCHILLA, CHINCHILLA_ITERATIONS, SIZE, DATA)}


def law_named(name: str) -> Law:
    """The law of that name; raises InputError listing the others."""
    if name not in LAWS:
        raise InputError(f"--law {name}: no such law; choose one of {', '.join(sorted(LAWS))}.")
    return LAWS[name]
