"""The laws by name: powers of size and of data, repeated data, and one E shared across architectures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from analysis.errors import InputError
from analysis.laws.coupled import coupled_law, kaplan_law
from analysis.laws.data_constrained import REPEATED
from analysis.laws.law import ITERATIONS, SIZE, TOKENS, Input, Law, power_law
from analysis.laws.moving_exponent import moving_law
from analysis.laws.user import is_file, law_of_file

LAWS: dict[str, Law] = {}
AUTO = "auto"
"""Chooses among the laws of AUTOMATIC."""


def law_named(name: str) -> Law:
    """Return the law of that name, or of FILE.py:NAME; raise InputError with the known names if there is none."""
    if is_file(name):
        return law_of_file(name, LAWS)
    if name not in LAWS:
        raise InputError(
            f"--law {name}: there is no such law; choose one of {', '.join(sorted(LAWS))}, {AUTO}, or a law of your "
            "own as FILE.py:NAME."
        )
    return LAWS[name]


def laws_named(text: str) -> tuple[Law, ...]:
    """Return the laws of `auto`, of a list such as `chinchilla,coupled`, or the one named; raises InputError."""
    if text == AUTO:
        return AUTOMATIC
    names = [name.strip() for name in text.split(",")]
    return tuple(law_named(name) for name in dict.fromkeys(names))


def plainest(laws: Sequence[Law]) -> Law:
    """Return the law with the fewest inputs and parameters, by which points are checked before any is chosen."""
    return min(laws, key=lambda law: (len(law.columns), len(law.names)))


def register(law: Law) -> Law:
    """Add a law to the catalogue and its columns to points tables; raise ValueError for a name that is taken."""
    if law.name in LAWS:
        raise ValueError(f"a law named {law.name} is registered already")
    LAWS[law.name] = law
    return law


def registered_inputs() -> dict[str, Input]:
    """Return the inputs of all laws by column."""
    return {one.column: one for law in LAWS.values() for one in law.inputs}


BY_SIZE, BY_TOKENS, BY_ITERATIONS = ("A", SIZE, "alpha"), ("B", TOKENS, "beta"), ("B", ITERATIONS, "beta")

# Hoffmann et al. 2022 (arXiv 2203.15556), equation 2.
CHINCHILLA = register(power_law("chinchilla", "L = E + A/N^α + B/D^β, D in tokens", BY_SIZE, BY_TOKENS))
CHINCHILLA_ITERATIONS = register(
    power_law("chinchilla_iterations", "L = E + A/N^α + B/T^β, T in iterations", BY_SIZE, BY_ITERATIONS)
)
# Kaplan et al. 2020 (arXiv 2001.08361), section 3, with an offset E.
SIZE_ALONE = register(power_law("size", "L = E + A/N^α", BY_SIZE))
register(power_law("data", "L = E + B/D^β, D in tokens", BY_TOKENS))
register(power_law("learning_curve", "L = E + B/T^β, T in iterations", BY_ITERATIONS))
register(REPEATED)
COUPLED = register(coupled_law("coupled", CHINCHILLA))
MOVING = register(moving_law("moving", CHINCHILLA))
register(kaplan_law("kaplan", CHINCHILLA))
AUTOMATIC = (CHINCHILLA, COUPLED, MOVING)
register(coupled_law("coupled_iterations", CHINCHILLA_ITERATIONS))
# Architectures that model the same data have one irreducible loss.
for _law in (CHINCHILLA, CHINCHILLA_ITERATIONS, SIZE_ALONE):
    _formula = f"{_law.formula}, one E for all architectures"
    register(replace(_law, name=f"{_law.name}_shared_e", formula=_formula, shared=("E",)))
