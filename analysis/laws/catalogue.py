"""The laws by name: powers of size and of data, repeated data, and one E shared across architectures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from analysis.errors import InputError
from analysis.laws.data_constrained import REPEATED
from analysis.laws.law import Array, Law

EXPONENT = (0.01, 3.0)


def _powers(theta: Array, z: Array) -> Array:
    """1 and exp(-theta_j z_j) for each input: a constant and one power law an input."""
    count = theta.shape[1]
    shape = (len(theta), z.shape[-2])
    phi = np.ones((*shape, count + 1))
    for j in range(count):
        np.exp(-theta[:, j, None] * z[..., j], out=phi[:, :, j + 1])
    return phi


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
LEARNING_CURVE = _one("learning_curve", "L = E + B/T^β, T in iterations", "iterations", "B", "beta")


def _one_e(law: Law) -> Law:
    """The same law with one irreducible loss for all architectures: they model the same data."""
    return replace(
        law, name=f"{law.name}_shared_e", formula=f"{law.formula}, one E for all architectures", shared=("E",)
    )


LAWS: Mapping[str, Law] = {
    law.name: law
    for law in (
        CHINCHILLA,
        CHINCHILLA_ITERATIONS,
        SIZE,
        DATA,
        LEARNING_CURVE,
        REPEATED,
        _one_e(CHINCHILLA),
        _one_e(CHINCHILLA_ITERATIONS),
        _one_e(SIZE),
    )
}


def law_named(name: str) -> Law:
    """The law of that name; raises InputError listing the others."""
    if name not in LAWS:
        raise InputError(f"--law {name}: no such law; choose one of {', '.join(sorted(LAWS))}.")
    return LAWS[name]
