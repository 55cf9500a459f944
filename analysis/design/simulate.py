"""Simulate a study before it is trained: draw losses around a known law, then fit and compare them like real ones.

The simulation uses the study's own fit, resamples and comparison, so that its results are those of the later report.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd

from analysis.design.prior import Noise, Prior
from analysis.findings.comparison import FittedArchitecture, fit_all
from analysis.findings.curve import Curve, Rung
from analysis.findings.equal_loss import SizeRatio, compare_at, headline_of, size_ratios
from analysis.findings.notes import rejected_because
from analysis.fitting.bootstrap import Scheme, choose_scheme, interval, resample
from analysis.fitting.patterns import pattern
from analysis.laws.law import Array
from analysis.points.table import CheckedPoints, build_frame, check_points

REPORTED_RESAMPLES, REPORTED_SEED = 1000, 0
"""Defaults of `fit`, on which its choice between two bootstraps depends."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Draws:
    """Number and seed of the simulated studies; equal draws are the same studies."""

    studies: int = 100
    resamples: int = 100
    """The median interval of many studies is within a few per cent of that with a thousand resamples."""
    seed: int = 0
    progress: Progress | None = field(default=None, compare=False)
    """Called with the number of studies simulated and their total."""


USUAL = Draws()
FRESH = Draws(seed=1_000_000)
"""Studies that the search for a grid did not use."""


@dataclass(frozen=True)
class Simulated:
    """Results of the analysis for each simulated study, and the truth from which it was drawn.

    Intervals are (studies, 2), those of parameters (studies, parameters, 2). A ratio that was not identified has the
    interval (0, inf). All studies are compared at the rung of the reference where the truth has its headline.
    """

    scheme: Scheme
    params: Mapping[str, Array]
    truth: Mapping[str, SizeRatio]
    ratio: Mapping[str, Array]
    found: Mapping[str, tuple[SizeRatio, ...]]


def grid_of(header: Sequence[str], rows: Sequence[Sequence[object]], source: str) -> CheckedPoints:
    """Return the points of a planned grid; their losses are not known yet."""
    numbered = [(number, [*row, 1.0]) for number, row in enumerate(rows, start=1)]
    return check_points(build_frame([*header, "loss"], numbered, f"study {source}"))


def drawn_losses(clean: Array, cluster: pd.Series[str], noise: Noise, seed: int, number: int) -> Array:
    """Draw the losses in nats of one simulated study: each series has a random factor, and each run another one."""
    rng = np.random.default_rng([seed, 6, number])
    codes, names = pd.factorize(cluster)
    off = noise.series * rng.standard_normal(len(names))[codes] + noise.run * rng.standard_normal(len(clean))
    out: Array = clean * np.exp(off)
    return out


def true_size_ratios(grid: CheckedPoints, prior: Prior, reference: str) -> list[SizeRatio]:
    """Return the headline of each architecture by the prior's own laws; raises InputError if the prior lacks one."""
    curves = {name: Curve(prior.law, prior.row(name), grid.of(name)) for name in grid.architectures}
    rows = [one.ratio for one in size_ratios(curves, reference)]
    found = (headline_of(rows, name) for name in grid.architectures)
    return [row for row in found if row is not None]


def simulate(grid: CheckedPoints, prior: Prior, reference: str, draws: Draws = USUAL) -> Simulated:
    """Draw studies of the grid under the prior, and fit and compare each as `fit` does.

    Raises InputError if the prior lacks an architecture.
    """
    clean = prior.losses(grid.frame)
    truth = {row.architecture: row for row in true_size_ratios(grid, prior, reference)}
    found: dict[str, list[SizeRatio]] = {name: [] for name in truth}
    params: dict[str, list[list[tuple[float, float]]]] = {name: [] for name in grid.architectures}
    scheme: Scheme | None = None
    for number in range(draws.studies):
        losses = drawn_losses(clean, grid.frame["cluster"], prior.noise, draws.seed, number)
        points = replace(grid, frame=grid.frame.assign(loss=losses))
        fits = fit_all(points.frames, prior.law)
        # The scheme of a report with its own number of resamples.
        scheme = scheme or choose_scheme(fits, REPORTED_RESAMPLES, REPORTED_SEED)
        drawn = resample(fits, draws.resamples, draws.seed + number, scheme)
        rejected = rejected_because(prior.law, pattern(fits, draws.seed + number))
        curves = {fit.architecture: FittedArchitecture.of(fit, points, drawn, rejected).curve for fit in fits}
        for name, row in truth.items():
            at = Rung(row.reference_n_params, row.iterations, row.tokens)
            arms = {name: curves[name], reference: curves[reference]}
            found[name].append(compare_at(arms, reference, at)[name].ratio)
        for name, rows in params.items():
            rows.append([interval(column) for column in drawn.params[name].T])
        if draws.progress is not None:
            draws.progress(number + 1, draws.studies)
    assert scheme is not None
    return Simulated(
        scheme=scheme,
        params={name: np.array(rows) for name, rows in params.items()},
        truth=truth,
        ratio={
            name: np.array([row.estimate_ci95 or (0.0, np.inf) for row in rows], dtype=np.float64)
            for name, rows in found.items()
        },
        found={name: tuple(rows) for name, rows in found.items()},
    )


def middle(ends: Array) -> tuple[float, float] | None:
    """Return the median ends of intervals (studies, 2); None if most studies have an interval without an end."""
    low, high = np.median(ends, axis=0)
    return (float(low), float(high)) if low > 0 and np.isfinite(high) else None


def holds(ends: Array, truth: float) -> float | None:
    """Return the share of the closed intervals (studies, 2) that contain the truth; None if none is closed."""
    closed = ends[np.isfinite(ends[:, 1])]
    return float(((closed[:, 0] <= truth) & (truth <= closed[:, 1])).mean()) if len(closed) else None
