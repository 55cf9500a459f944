"""Scaling laws: a sum of linear coefficients times a basis, with an analytic Jacobian, in inputs that the law declares.

A law is `loss = sum_k c_k phi_k(x; theta)`, so that one solver can project the linear coefficients out and all laws
share one Jacobian rule. The solver centres inputs on their geometric means, where A N^-alpha becomes
A' exp(-alpha (ln N - ln N0)): otherwise A and alpha are correlated to the last digit. Arrays have a leading axis of
problems (resamples), so that one call makes a thousand refits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd

Array = NDArray[np.float64]
Interval = tuple[float, float]
Terms = Callable[[Array, Array], Array]
Bends = Callable[[Array, Array, Array], Array]

EXPONENT = (0.01, 3.0)
"""Bounds of an exponent."""


@dataclass(frozen=True)
class Input:
    """A column that laws read, with all that the rest of the analysis needs to know about it."""

    column: str
    symbol: str
    """Letter in a formula."""
    axis: Literal["size", "data"] | None = None
    """Axis of the study; None for a further input, which comparisons and curves hold fixed."""
    label: str = ""
    """Name on the axis of a figure."""
    ceiling: float = 1e24
    """Largest value a table may hold: a larger one is a mistake of units or an overflow."""
    centred_as: str | None = None
    """Column whose centre the solver uses for this one too, where the law compares the two."""
    held_at: Callable[[pd.Series[float]], float] = lambda values: float(values.median())
    """Value at which curves hold a further input, computed from the architecture's points."""
    refusal: Callable[[pd.DataFrame], str] | None = None
    """Returns why an architecture's rows cannot identify the effect of this input, or an empty string."""


SIZE = Input("n_params", "N", "size", "parameters", ceiling=1e18)
TOKENS = Input("tokens", "D", "data", "training tokens")
ITERATIONS = Input("iterations", "T", "data", "training iterations", ceiling=1e15)


@dataclass(frozen=True)
class Law:
    """One parametric form: `inputs` are the columns of x, `linear` the coefficients, `nonlinear` the rest.

    `terms(theta, z)` takes theta (problems, nonlinear) and the centred logarithms z, (points, inputs) or (problems,
    points, inputs), and returns phi (problems, points, linear). `bends(phi, z, c)` returns the derivative of the loss
    by the nonlinear parameters (problems, points, nonlinear) at coefficients c (problems, linear). `scaled` maps a
    coefficient to the (column, exponent) whose centring it absorbs. Parameters in `shared` have one value for all
    architectures.

    A law that contains another one, `simpler`, as a special case is fitted from the fit of that one: `further` names
    the parameters that it adds with the values to start from, first that at which the two laws are the same.
    """

    name: str
    formula: str
    inputs: tuple[Input, ...]
    linear: tuple[str, ...]
    nonlinear: tuple[str, ...]
    bounds: tuple[Interval, ...]
    terms: Terms
    bends: Bends
    scaled: Mapping[str, tuple[str, str]]
    shared: tuple[str, ...] = ()
    simpler: Law | None = None
    further: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    unit_bound: tuple[str, ...] = ()
    """Parameters whose value depends on the units in another way than `scaled` says: they are not profiled."""
    without_size: Mapping[str, float] = field(default_factory=dict)
    """Values of parameters at which the loss does not depend on size; by default its coefficients are 0."""

    @property
    def sizeless(self) -> Mapping[str, float]:
        """Values of parameters at which the loss does not depend on size; empty if the law has no size."""
        if self.without_size or self.size is None:
            return self.without_size
        return {name: 0.0 for name, (column, _) in self.scaled.items() if column == self.size.column}

    def lifted(self, u: Array) -> Array:
        """Return starts (.., starts, parameters) of parameters u (.., parameters) of the simpler law.

        The first of them is the simpler law itself.
        """
        values = np.array(list(product(*self.further.values())))
        lead = np.broadcast_to(u[..., None, :], (*u.shape[:-1], len(values), u.shape[-1]))
        more = np.broadcast_to(values, (*lead.shape[:-1], values.shape[-1]))
        return np.concatenate([lead, more], axis=-1)

    @property
    def names(self) -> tuple[str, ...]:
        """All parameters in the order of the solver's columns, linear ones first."""
        return (*self.linear, *self.nonlinear)

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of a points table that the law reads, in the order of x."""
        return tuple(one.column for one in self.inputs)

    @property
    def size(self) -> Input | None:
        """Input on the size axis; None if the law has none."""
        return next((one for one in self.inputs if one.axis == "size"), None)

    @property
    def data(self) -> Input | None:
        """Input on the data axis; None if the law has none."""
        return next((one for one in self.inputs if one.axis == "data"), None)

    @property
    def axes(self) -> tuple[int, ...]:
        """Columns of x whose inputs are an axis."""
        return tuple(j for j, one in enumerate(self.inputs) if one.axis)

    @property
    def counts_iterations(self) -> bool:
        """True if the law counts data in iterations and not in tokens."""
        return ITERATIONS in self.inputs

    def x(self, rows: pd.DataFrame) -> Array:
        """Return the inputs (points, inputs) of a table's rows."""
        out: Array = rows[list(self.columns)].to_numpy(dtype=np.float64)
        return out

    def predict(self, u: Array, z: Array) -> Array:
        """Return the loss in nats (problems, points) at solver parameters u (problems, parameters)."""
        k = len(self.linear)
        loss: Array = (self.terms(u[:, k:], z) @ u[:, :k, None])[:, :, 0]
        return loss

    def predict_with_jacobian(self, u: Array, z: Array) -> tuple[Array, Array]:
        """Return the loss (problems, points) and its derivative (problems, points, parameters)."""
        k = len(self.linear)
        phi = self.terms(u[:, k:], z)
        loss: Array = (phi @ u[:, :k, None])[:, :, 0]
        return loss, np.concatenate([phi, self.bends(phi, z, u[:, :k])], axis=2)

    def centre(self, x: Array) -> Array:
        """Return the solver's origin: the mean logarithms of x (points, inputs)."""
        return self._joined(np.log(x).mean(axis=0))

    def uncentred(self, centre: Array, column: str) -> Array:
        """Return `centre` with one input uncentred, so that the coefficient of its term is the law's own."""
        out = centre.copy()
        out[self.columns.index(column)] = 0.0
        return self._joined(out)

    def centred(self, x: Array, centre: Array) -> Array:
        """Return the logarithms of x (points, inputs) about `centre` (inputs)."""
        return np.log(x) - centre

    def to_public(self, u: Array, centre: Array) -> Array:
        """Convert solver parameters (problems, parameters) to the law's own, in the units of x."""
        return self._rescale(u, centre, +1.0)

    def to_solver(self, public: Array, centre: Array) -> Array:
        """Convert parameters in the units of x (problems, parameters) to those of the solver."""
        return self._rescale(public, centre, -1.0)

    def _joined(self, centre: Array) -> Array:
        for j, one in enumerate(self.inputs):
            if one.centred_as is not None:
                centre[j] = centre[self.columns.index(one.centred_as)]
        return centre

    def _rescale(self, values: Array, centre: Array, sign: float) -> Array:
        out = np.array(values, dtype=np.float64)
        for coefficient, (column, exponent) in self.scaled.items():
            shift = centre[self.columns.index(column)]
            power = values[:, self.names.index(exponent)]
            out[:, self.names.index(coefficient)] *= np.exp(np.clip(sign * power * shift, -700.0, 700.0))
        return out


def no_bends(phi: Array, z: Array, coefficients: Array) -> Array:
    """Stand for the `bends` of a law that is no sum of terms: it overrides `predict_with_jacobian`."""
    raise NotImplementedError("the law overrides predict_with_jacobian")


def power_law(name: str, formula: str, *terms: tuple[str, Input, str]) -> Law:
    """Make the law of E plus coefficient / input^exponent for each (coefficient, input, exponent)."""
    return Law(
        name=name,
        formula=formula,
        inputs=tuple(one for _, one, _ in terms),
        linear=("E", *(coefficient for coefficient, _, _ in terms)),
        nonlinear=tuple(exponent for _, _, exponent in terms),
        bounds=(EXPONENT,) * len(terms),
        terms=powers,
        bends=_power_bends,
        scaled={coefficient: (one.column, exponent) for coefficient, one, exponent in terms},
    )


def powers(theta: Array, z: Array) -> Array:
    """Return a constant 1 and exp(-theta_j z_j) for each input."""
    phi = np.ones((len(theta), z.shape[-2], theta.shape[1] + 1))
    for j in range(theta.shape[1]):
        np.exp(-theta[:, j, None] * z[..., j], out=phi[:, :, j + 1])
    return phi


def _power_bends(phi: Array, z: Array, coefficients: Array) -> Array:
    each = [-z[..., j] * phi[:, :, j + 1] * coefficients[:, None, j + 1] for j in range(phi.shape[2] - 1)]
    return np.stack(each, axis=2)
