"""Patterns that a law lacks, left in the residuals of the architectures fitted with it.

For each direction (curvature in size, in data and in compute, and size and data acting together) the residuals of every
series give one score. Under a right law the scores scatter around zero, whatever the errors within a series have in
common, so the test flips the signs of whole series (a wild score test: Kline and Santos 2012, doi
10.1515/2156-6674.1006). A law that bends wrongly does so for every architecture, so their scores count together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from analysis.fitting.bootstrap import Fitted
from analysis.fitting.scale import clipped, robust_scale
from analysis.laws.law import Array

STRUCTURED = 0.01
"""Probability by chance from which on a pattern is none."""
FLIPS = 1999
FLIPPED = 8_000_000  # signs drawn at once
BETWEEN = 3  # parameters (E, A, alpha) that only differences between series of different sizes identify
LEAST = 1e-3  # share of a direction that the law must leave over
ALIKE = 0.9
TOGETHER = "size and data acting together"


@dataclass(frozen=True)
class Pattern:
    """A pattern in residuals: its strongest term, its size relative to the loss, and its probability by chance."""

    term: str
    size: float
    p: float

    @property
    def rejects(self) -> bool:
        """True if chance does not explain the pattern."""
        return self.p <= STRUCTURED


@dataclass(frozen=True)
class Scores:
    """Scores of one architecture (series, directions) in robust deviations of its residuals."""

    of: Array
    share: Array  # (directions) of the degrees of freedom of the series that the fit leaves to the direction
    there: Array  # (directions) 1 if the points and the law leave something over of the direction, else 0
    size: Array  # (directions) root mean square of the pattern, relative to the loss

    @cached_property
    def total(self) -> Array:
        """Scores of all series together (directions)."""
        out: Array = self.of.sum(axis=0)
        return out


def pattern(fits: Sequence[Fitted], seed: int) -> Pattern | None:
    """Judge what the law lacks from the residuals of all `fits` together; None if nothing can be judged.

    A law without size and data has no directions, and a fit that meets all points has no residuals.
    """
    names = directions(fits[0])
    scores = [one for fit in fits if (one := _scores(fit, len(names))) is not None]
    if not names or not scores:
        return None
    variance = sum((one.of**2).sum(axis=0) for one in scores)
    there = np.max([one.there for one in scores], axis=0) * (variance > 0)
    if not there.any():
        return None
    weight = np.mean([one.share for one in scores], axis=0) * there / np.where(variance > 0, variance, 1.0)
    rng = np.random.default_rng([seed, 4])
    at_once = max(1, FLIPPED // sum(len(one.of) for one in scores))
    seen = _strength([one.total[None] for one in scores], weight)[0]
    chance = np.concatenate(
        [
            _strength([rng.choice([-1.0, 1.0], (count, len(one.of))) @ one.of for one in scores], weight)
            for count in (min(at_once, FLIPS - done) for done in range(0, FLIPS, at_once))
        ]
    ).max(axis=1)
    p = (1 + int((chance >= seen.max() * (1 - 1e-12)).sum())) / (1 + FLIPS)
    # Curvature in compute is nearly that of one of the others: the plainest of equally strong terms is named.
    strongest = int(np.argmax(seen >= ALIKE * seen.max()))
    return Pattern(names[strongest], float(np.sqrt(np.mean([one.size[strongest] ** 2 for one in scores]))), p)


def directions(fit: Fitted) -> list[str]:
    """Return the names of the directions in which residuals of a law can have a pattern."""
    law = fit.problem.law
    names = [f"curvature in {law.inputs[j].axis}" for j in law.axes]
    return [*names, TOGETHER, "curvature in compute"] if law.size and law.data else names


def _strength(totals: Sequence[Array], weight: Array) -> Array:
    """Return the larger squared scores (rows, directions): of the sum over architectures, or summed over them."""
    alike = np.asarray(sum(totals)) ** 2
    apart = np.asarray(sum(one**2 for one in totals))
    out: Array = np.maximum(alike, apart) * weight
    return out


def _scores(fit: Fitted, count: int) -> Scores | None:
    problem, law = fit.problem, fit.problem.law
    loss, jacobian = law.predict_with_jacobian(fit.result.u[None], problem.z)
    residual = problem.y - np.log(loss[0])
    used = problem.weight > 0
    scale = robust_scale(residual[used], len(law.names))
    if not scale or not np.isfinite(scale):
        return None
    residual = np.where(used, clipped(residual, scale), 0.0)
    slope = jacobian[0] / loss[0][:, None]
    z = problem.z[:, law.axes]
    z = z / np.maximum(z.std(axis=0), 1e-12)
    lacking = [z[:, j] ** 2 for j in range(z.shape[1])]
    if z.shape[1] == 2:
        lacking += [z[:, 0] * z[:, 1], (z[:, 0] + z[:, 1]) ** 2]
    whole = np.stack(lacking, axis=1)
    left = whole - slope @ np.linalg.lstsq(slope, whole, rcond=None)[0]
    norm = np.linalg.norm(left, axis=0)
    there = (norm > LEAST * np.linalg.norm(whole - whole.mean(axis=0), axis=0)).astype(np.float64)
    left = left * there / np.where(norm > 0, norm, 1.0)
    of = np.zeros((len(fit.keys), count))
    np.add.at(of, fit.cluster, left * residual[:, None] / scale)
    # Of a direction that varies between series, the fit of E, A and alpha takes some of their degrees of freedom.
    rows = np.bincount(fit.cluster).astype(np.float64)
    sums = np.zeros((len(fit.keys), count))
    np.add.at(sums, fit.cluster, left)
    between = (sums**2 / rows[:, None]).sum(axis=0)
    # Unequal scores count as fewer series.
    series = (of**2).sum(axis=0) ** 2 / np.maximum((of**4).sum(axis=0), 1e-300)
    taken = BETWEEN / (series + BETWEEN)
    return Scores(of, 1.0 - taken * between, there, np.abs(left.T @ residual) / np.sqrt(len(residual)))
