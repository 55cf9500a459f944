"""Fitted curves with their 95 % ribbons, ready to be drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from analysis.findings.curve import Curve
from analysis.laws.catalogue import law_named
from analysis.laws.law import Array
from analysis.points.checks import data_column

if TYPE_CHECKING:
    from analysis.findings.results import FitDocument
    from analysis.points.table import CheckedPoints

STEPS = 60
MARGIN = 1.12  # how far a curve runs past the points it was fitted to
MANY = 8
REACH = 3.0


@dataclass(frozen=True)
class Line:
    """One curve: x in its own unit, the fitted loss and its 95 % ribbon (no wider than the fit without resamples)."""

    label: float  # the budget or the size held fixed
    x: Array
    loss: Array
    low: Array
    high: Array


@dataclass(frozen=True)
class Spread:
    """A fitted law at its estimate and its resamples, ready to be drawn."""

    name: str
    curve: Curve
    budget: str  # iterations or tokens

    def over_sizes(self, budget: float) -> Line:
        """Loss against parameters at one budget."""
        sizes = self.curve.sizes
        x = np.geomspace(sizes[0] / MARGIN, sizes[-1] * MARGIN, STEPS)
        return self._line(budget, x, [(float(n), self._data(budget)) for n in x])

    def over_budgets(self, n_params: float) -> Line:
        """Loss against iterations (else tokens) at one size."""
        budgets = self.budgets
        x = np.geomspace(budgets[0] / MARGIN, budgets[-1] * MARGIN, STEPS)
        return self._line(n_params, x, [(n_params, self._data(float(t))) for t in x])

    @property
    def budgets(self) -> Array:
        """Trained budgets in ascending order, a handful where there are many."""
        return thin(np.unique(self.curve.frame[self.budget].to_numpy(dtype=np.float64)))

    @property
    def sizes(self) -> Array:
        """Trained sizes in ascending order, a handful where there are many."""
        return thin(self.curve.sizes)

    def fitted(self) -> Array:
        """The fit's loss at every point of the architecture (points)."""
        return self.curve.loss_of_points()

    def _data(self, budget: float) -> float:
        return self.curve.data(budget, budget) if self.budget == "iterations" else budget

    def _line(self, label: float, x: Array, inputs: list[tuple[float, float]]) -> Line:
        values = np.stack([self.curve.loss(n_params, data) for n_params, data in inputs], axis=1)
        drawn = values[1:] if len(values) > 1 else values
        seen = self.curve.frame["loss"].to_numpy(dtype=np.float64)
        low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
        # A ribbon without an end would make an axis without one: far outside the points it is cut.
        low, high = np.clip([low, high], seen.min() / REACH, seen.max() * REACH)
        return Line(label, x, values[0], low, high)


def thin(values: Array) -> Array:
    """At most 8 of the values, evenly taken, both ends kept."""
    if len(values) <= MANY:
        return values
    kept: Array = values[np.unique(np.linspace(0, len(values) - 1, MANY).round().astype(int))]
    return kept


def spreads(points: CheckedPoints, document: FitDocument) -> list[Spread]:
    """One fitted law an architecture, the reference first."""
    law = law_named(document.law)
    names = sorted(document.architectures, key=lambda name: (name != document.comparison.reference, name))
    out = []
    for name in names:
        fit, frame = document.architectures[name], points.of(name)
        params = np.vstack([[list(fit.params.values())], document.draws(name)])
        out.append(Spread(name, Curve(law, params, frame), data_column(frame)))
    return out
