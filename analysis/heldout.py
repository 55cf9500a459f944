"""The law's error on what it has not seen: the largest sizes and the longest budgets, left out and predicted.

In-sample error says little about extrapolation (0.25 % against -3.8 % on the OLMo ladder), so it never stands alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.fit import Problem, Status, fit_law
from analysis.joint import fit_shared
from analysis.law import Array, Law

MANY = 10  # above so many distinct values the top fifth of the rows is left out instead of the top value
TOP_SHARE = 0.8


@dataclass(frozen=True)
class Split:
    """Rows left out at and above `threshold`, the fit of the rest, and its predictions for them."""

    threshold: float
    left_out: NDArray[np.bool_]
    predicted: Array  # nats, one for each row left out
    relative_error: Array  # (predicted - observed) / observed
    status: Status
    determined: bool  # whether the rest still holds three sizes and three budgets


def held_out(
    law: Law, x: Array, loss: Array, delta: float, column: int, others: Sequence[Problem] = ()
) -> Split | None:
    """Leave out the top of input `column`, fit the rest, predict; None where no other value is left to fit.

    `others` are architectures that share a parameter, fitted whole beside the rest.
    """
    values = np.unique(x[:, column])
    if len(values) < 2:
        return None
    threshold = float(values[-1]) if len(values) <= MANY else float(np.quantile(x[:, column], TOP_SHARE))
    out = x[:, column] >= threshold
    rest = ~out
    if rest.sum() < 2:
        return None
    problem = Problem.of(law, x[rest], loss[rest], delta)
    result = fit_shared([problem, *others]).result_of(0) if others else fit_law(problem)
    predicted = law.predict(result.u[None], law.centred(x[out], problem.centre))[0]
    return Split(
        threshold=threshold,
        left_out=out,
        predicted=predicted,
        relative_error=predicted / loss[out] - 1.0,
        status=result.status,
        determined=all(len(np.unique(x[rest][:, j])) >= 3 for j in range(min(2, x.shape[1]))),
    )
