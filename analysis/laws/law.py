"""What a law of the loss is: a sum of linear coefficients times a basis, with an analytic Jacobian.

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

Array = NDArray[np.float64]
Terms = Callable[[Array, Array], Array]
Bends = Callable[[Array, Array, Array], Array]


@dataclass(frozen=True)
class Law:
    """One parametric form: `inputs` name the columns of x, `linear` the coefficients, `nonlinear` the rest.

    `terms(theta, z)` takes theta (problems, nonlinear) and z, the centred logarithms, (points, inputs) or a set of
    points for each problem (problems, points, inputs), and returns phi (problems, points, linear). `bends(phi, z, c)`
    is the derivative of the loss by the nonlinear parameters (problems, points, nonlinear) at coefficients c
    (problems, linear). `scaled` maps a coefficient to the (input, exponent) whose centring it absorbs. Parameters in
    `shared` have one value for all architectures.
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
    shared: tuple[str, ...] = ()

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

    def centre(self, x: Array) -> Array:
        """Mean logarithms of x (points, inputs): where the solver puts its origin."""
        out: Array = np.log(x).mean(axis=0)
        return out

    def uncentred(self, centre: Array, column: str) -> Array:
        """`centre` with one input at its own origin, where the coefficient of its term is the law's own."""
        out = centre.copy()
        out[self.inputs.index(column)] = 0.0
        return out

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
