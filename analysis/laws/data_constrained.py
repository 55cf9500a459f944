"""The law of repeated data: a repeated token is worth less, and so is a parameter beyond what the data can use.

Muennighoff et al. 2023 (arXiv 2305.16264), equations 5 to 7. With U_D = min(D, unique tokens) and
R_D = D/U_D - 1 repetitions, D_eff = U_D (1 + R_D* (1 - exp(-R_D/R_D*))). With U_N = min(N, N_opt(U_D)), the size
that is compute-optimal for U_D tokens, N_eff follows in the same way. The code uses expm1 throughout: 1 - exp loses all
digits where R* is large, and its noise looks like a minimum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from analysis.laws.law import EXPONENT, SIZE, TOKENS, Array, Input, Law, no_bends

if TYPE_CHECKING:
    import pandas as pd

TINY = 1e-30
REPEATS = (0.05, 1e4)


@dataclass(frozen=True)
class RepeatedLaw(Law):
    """E + A/N_eff^alpha + B/D_eff^beta; N_eff depends on A, B, alpha and beta through N_opt.

    Tokens and unique tokens have one centre, so ln N_opt(U_D) = (ln(alpha A / beta B) + beta ln U_D) / alpha holds
    for the solver's parameters too: the centres cancel.
    """

    def predict(self, u: Array, z: Array) -> Array:
        """Return the loss in nats (problems, points) at solver parameters u (problems, parameters)."""
        return self._evaluate(u, z)[0]

    def predict_with_jacobian(self, u: Array, z: Array) -> tuple[Array, Array]:
        """Return the loss (problems, points) and its derivative (problems, points, parameters)."""
        loss, now = self._evaluate(u, z)
        A, B, alpha, beta = (u[:, j, None] for j in (1, 2, 3, 4))
        # Where U_N is N_opt, it depends on the parameters, and so does N_eff: d N-term / d ln U_N.
        pull = (
            -alpha * now.by_size * np.where(now.capped, 1.0 - now.size.gain * (1.0 + now.size.repeats), 0.0)
        )
        columns = (
            np.ones_like(loss),
            (now.by_size + pull / alpha) / np.maximum(A, TINY),
            (now.by_data - pull / alpha) / np.maximum(B, TINY),
            -now.size.log * now.by_size + pull * (1.0 / alpha - now.optimal) / alpha,
            -now.data.log * now.by_data + pull * (now.unique - 1.0 / beta) / alpha,
            -beta * now.by_data * now.data.bend,
            -alpha * now.by_size * now.size.bend,
        )
        return loss, np.stack(columns, axis=2)

    def _evaluate(self, u: Array, z: Array) -> tuple[Array, _Now]:
        E, A, B, alpha, beta, r_data, r_size = (u[:, j, None] for j in range(7))
        size, data, unique = (z[..., j] for j in range(3))
        unique = np.minimum(data, unique)
        ratio = np.log(alpha * np.maximum(A, TINY)) - np.log(beta * np.maximum(B, TINY))
        optimal = (ratio + beta * unique) / alpha
        capped = optimal < size
        by, on = _effective(size, np.where(capped, optimal, size), r_size), _effective(data, unique, r_data)
        by_size = A * np.exp(np.clip(-alpha * by.log, -700.0, 700.0))
        by_data = B * np.exp(np.clip(-beta * on.log, -700.0, 700.0))
        return E + by_size + by_data, _Now(by_size, by_data, unique, optimal, capped, by, on)


@dataclass(frozen=True)
class _Effective:
    """Logarithm of N_eff or D_eff, its derivatives by the repetitions R and by R*, and R."""

    log: Array
    gain: Array
    bend: Array
    repeats: Array


@dataclass(frozen=True)
class _Now:
    """Values that both loss and Jacobian need: the two terms, ln U_D, ln N_opt(U_D), and a mask of N beyond it."""

    by_size: Array
    by_data: Array
    unique: Array
    optimal: Array
    capped: NDArray[np.bool_]
    size: _Effective
    data: _Effective


def _effective(total: Array, useful: Array, star: Array) -> _Effective:
    repeats = np.expm1(np.minimum(total - useful, 300.0))
    share = repeats / star
    kept = -np.expm1(-share)
    worth = 1.0 + star * kept
    spent = np.exp(-share)
    return _Effective(useful + np.log(worth), spent / worth, (kept - share * spent) / worth, repeats)


def _terms(theta: Array, z: Array) -> Array:
    """Return the basis for the solver's starts (problems, points, linear); exact except where N is beyond N_opt."""
    alpha, beta, r_data, _ = (theta[:, j, None] for j in range(4))
    by_data = np.exp(-beta * _effective(z[..., 1], np.minimum(z[..., 1], z[..., 2]), r_data).log)
    by_size = np.exp(-alpha * z[..., 0]) + np.zeros_like(by_data)
    return np.stack([np.ones_like(by_data), by_size, by_data], axis=2)


def _never_repeated(rows: pd.DataFrame) -> str:
    if (rows["tokens"] > rows["unique_tokens"]).any():
        return ""
    return (
        f"row {rows['row'].iloc[0]}, column unique_tokens: no run of {rows['architecture'].iloc[0]} repeated its data, "
        "so the worth of a repetition cannot be fitted; use --law chinchilla"
    )


UNIQUE_TOKENS = Input(
    "unique_tokens",
    "U",
    centred_as="tokens",
    held_at=lambda values: float(values.max()),
    refusal=_never_repeated,
)

REPEATED = RepeatedLaw(
    name="data_constrained",
    formula="L = E + A/N′^α + B/D′^β, N′ and D′ discounted by R_N and R_D where data repeat",
    inputs=(SIZE, TOKENS, UNIQUE_TOKENS),
    linear=("E", "A", "B"),
    nonlinear=("alpha", "beta", "R_D", "R_N"),
    bounds=(EXPONENT, EXPONENT, REPEATS, REPEATS),
    terms=_terms,
    bends=no_bends,
    scaled={"A": ("n_params", "alpha"), "B": ("tokens", "beta")},
)
