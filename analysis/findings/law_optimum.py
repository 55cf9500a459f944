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
FINER = np.linspace(-1.0, 1.0, 7)  # the second grid, in steps of the first
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

    def at(self, budget: int) -> LawOptimum:
        """Return the optima of one budget (problems, 1)."""
        here = slice(budget, budget + 1)
        return LawOptimum(
            self.log_size[:, here], self.loss[:, here], self.below[:, here], self.above[:, here]
        )


def law_optimum(curve: Curve, params: Array, log_flops: Array) -> LawOptimum:
    """Minimise the law with params (problems, parameters) over size at log FLOPs (budgets).

    A size costs the FLOPs a token that `Curve.log_rate` gives it. `rough` finds ln N, `refined` corrects it.
    """
    found = rough(curve, params, log_flops)
    each = max(1, CELLS // (len(params) * len(FINER)))
    parts = [
        refined(curve, params, log_flops[start : start + each], found.log_size[:, start : start + each])
        for start in range(0, len(log_flops), each)
    ]
    log_size, loss = (np.concatenate(values, axis=1) for values in zip(*parts, strict=True))
    return found._replace(log_size=log_size, loss=loss)


def rough(curve: Curve, params: Array, log_flops: Array) -> LawOptimum:
    """Take the lowest of a grid over the sizes, and the parabola through its neighbours: ln N to some .01."""
    low, high = np.log(curve.sizes[[0, -1]]) + np.array([-REACH, REACH])
    grid = np.linspace(low, high, int(np.ceil((high - low) / STEP)) + 1)
    each = max(1, CELLS // (len(params) * len(grid)))
    losses = [
        _losses(curve, params, grid, log_flops[start : start + each, None])
        for start in range(0, len(log_flops), each)
    ]
    loss = np.concatenate(losses, axis=1)
    place, shift, lowest = _vertex(loss)
    at = grid[place] + shift * (grid[1] - grid[0])
    end = np.argmin(loss, axis=2)
    return LawOptimum(at, lowest, end == 0, end == len(grid) - 1)


def refined(curve: Curve, params: Array, log_flops: Array, log_size: Array) -> tuple[Array, Array]:
    """Return ln N and the loss (problems, budgets) at the optimum close to `log_size`: ln N to some .0002.

    Log FLOPs are the same for all problems (budgets), or each problem's own (problems, budgets).
    """
    sizes = log_size[..., None] + STEP * FINER
    place, shift, lowest = _vertex(_losses(curve, params, sizes, log_flops[..., None]))
    return log_size + STEP * (FINER[place] + shift * (FINER[1] - FINER[0])), lowest


def _vertex(loss: Array) -> tuple[NDArray[np.int64], Array, Array]:
    """Return the place of the lowest of losses (..., sizes), and the parabola through its neighbours.

    That is the distance of its minimum from the place, in steps, and its least loss.
    """
    place = np.clip(np.argmin(loss, axis=-1), 1, loss.shape[-1] - 2)
    a, b, c = (np.take_along_axis(loss, (place + by)[..., None], -1)[..., 0] for by in (-1, 0, 1))
    bend = a - 2 * b + c
    shift = np.clip(np.where(bend > 0, 0.5 * (a - c) / np.where(bend > 0, bend, 1.0), 0.0), -1, 1)
    return place, shift, b - 0.25 * (a - c) * shift


def _losses(curve: Curve, params: Array, log_sizes: Array, log_flops: Array) -> Array:
    """Return the loss (problems, budgets, sizes) at log sizes and equal compute, which have or lack each axis."""
    tokens = np.exp(log_flops - curve.log_rate(log_sizes))
    sizes, data = np.broadcast_arrays(np.exp(log_sizes), tokens / curve.tokens_a_unit)
    flat = (len(params), -1) if sizes.ndim == 3 else (-1,)
    loss = curve.losses_at(params, sizes.reshape(flat), data.reshape(flat))
    return loss.reshape(len(params), *sizes.shape[-2:])
