"""The size at which a law has its lowest loss for given training FLOPs, and that loss, in every resample."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.findings.curve import Curve
from analysis.laws.law import Array

REACH = float(np.log(10.0))
"""Distance in ln N outside the trained sizes up to which a law's optimum is searched."""
STEP = 0.3  # of the first grid in ln N
FINER = np.linspace(-1.0, 1.0, 9)  # the second grid, in steps of the first
CELLS = 400_000  # law values computed at once


class LawOptimum(NamedTuple):
    """Log size and loss in nats at the optimum (problems, budgets).

    `below` and `above` are True where the loss still falls at that end of the searched sizes: no optimum is known.
    """

    log_size: Array
    loss: Array
    below: NDArray[np.bool_]
    above: NDArray[np.bool_]

    @property
    def inside(self) -> NDArray[np.bool_]:
        """True where the optimum lies inside the searched sizes."""
        out: NDArray[np.bool_] = ~(self.below | self.above)
        return out


def law_optimum(curve: Curve, params: Array, log_flops: Array) -> LawOptimum:
    """Minimise the law with params (problems, parameters) over size at log FLOPs (budgets) or (problems, budgets).

    A size costs the FLOPs a token that `Curve.log_rate` gives it. A grid over the sizes, a finer one about its lowest
    point and a parabola through three points of that find ln N to some .0002.
    """
    trained = np.log(curve.sizes[[0, -1]])
    width = trained[1] - trained[0] + 2 * REACH
    grid = np.linspace(trained[0] - REACH, trained[1] + REACH, int(np.ceil(width / STEP)) + 1)
    budgets = np.broadcast_to(log_flops, (len(params), np.shape(log_flops)[-1]))
    own = np.ndim(log_flops) == 2
    each = max(1, CELLS // (len(params) * len(grid)))
    parts = []
    for start in range(0, budgets.shape[1], each):
        part = budgets[:, start : start + each]
        parts.append(_searched(curve, params, part if own else part[:1], grid))
    return LawOptimum(*(np.concatenate(values, axis=1) for values in zip(*parts, strict=True)))


def _searched(curve: Curve, params: Array, budgets: Array, grid: Array) -> LawOptimum:
    rows = np.arange(len(params))[:, None], np.arange(budgets.shape[1])
    loss = _losses(curve, params, np.broadcast_to(grid, (*budgets.shape, len(grid))), budgets)
    lowest = np.argmin(loss, axis=2)
    step = grid[1] - grid[0]
    middle = grid[np.clip(lowest, 1, len(grid) - 2)]
    budgets = np.broadcast_to(budgets, middle.shape)
    loss = _losses(curve, params, middle[..., None] + step * FINER, budgets)
    place = np.clip(np.argmin(loss, axis=2), 1, len(FINER) - 2)
    a, b, c = (loss[*rows, place + by] for by in (-1, 0, 1))
    bend = a - 2 * b + c
    shift = np.clip(np.where(bend > 0, 0.5 * (a - c) / np.where(bend > 0, bend, 1.0), 0.0), -1, 1)
    at = middle + step * (FINER[place] + shift * (FINER[1] - FINER[0]))
    return LawOptimum(at, b - 0.25 * (a - c) * shift, lowest == 0, lowest == len(grid) - 1)


def _losses(curve: Curve, params: Array, log_sizes: Array, budgets: Array) -> Array:
    """Return the loss (problems, budgets, sizes) at log sizes (problems or 1, budgets, sizes) and equal compute."""
    tokens = np.exp(budgets[..., None] - curve.log_rate(log_sizes))
    flat = (len(log_sizes), -1) if len(log_sizes) > 1 else (-1,)
    sizes, data = (values.reshape(flat) for values in (np.exp(log_sizes), tokens / curve.tokens_a_unit))
    return curve.losses_at(params, sizes, data).reshape(len(params), *log_sizes.shape[1:])
