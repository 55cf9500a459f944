"""What the drawn and the interactive figures share: colours safe for the colour-blind, and ticks in real units.

Fitted curves with their ribbons, computed once for the drawn and the interactive figures alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.findings.curve import Curve
from analysis.laws.catalogue import law_named
from analysis.laws.law import ITERATIONS, TOKENS, Array
from analysis.points.checks import data_column

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from analysis.findings.results import FitDocument
    from analysis.points.table import CheckedPoints

# Okabe and Ito's palette, one colour an architecture wherever it appears.
COLOURS = {
    "cross_transformer": "#0072B2",
    "prefix_simba": "#D55E00",
    "cross_simba": "#009E73",
    "prefix_mamba": "#CC79A7",
}
OTHERS = ("#E69F00", "#56B4E9", "#000000", "#8C6D31", "#5B5B5B")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
INK = "#1F2933"
RC: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.edgecolor": "#7B8794",
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E7EB",
    "grid.linewidth": 0.8,
    "xtick.color": "#52606D",
    "ytick.color": "#52606D",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "text.parse_math": False,
    "svg.hashsalt": "ssmscale",
    "svg.fonttype": "path",
}
LOSS = "held-out loss (nats a token)"
PARAMETERS = "parameters"


def colour(name: str, names: Sequence[str]) -> str:
    """The architecture's colour, the same in every figure."""
    others = sorted(set(names) - set(COLOURS))
    return COLOURS.get(name) or OTHERS[others.index(name) % len(OTHERS)]


def shade(base: str, share: float) -> str:
    """`base` mixed with white: share 1 is the colour itself, 0 is white."""
    parts = [int(base[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(255 - share * (255 - part)):02X}" for part in parts)


def shades(base: str, count: int) -> list[str]:
    """Light to full, one a line of a family."""
    return [shade(base, share) for share in (np.linspace(0.42, 1.0, count) if count > 1 else [1.0])]


def plain_ticks(low: float, high: float) -> list[float]:
    """Ticks at 1, 2, 5 times powers of ten within the range, thinned to decades where it spans many."""
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    steps = (1, 2, 5) if high / low < 300 else (1,)
    ticks = [step * 10.0**power for power in decades for step in steps]
    inside = [tick for tick in ticks if low <= tick <= high]
    return inside if len(inside) >= 2 else [float(f"{value:.2g}") for value in np.geomspace(low, high, 4)]


def linear_ticks(values: Array) -> tuple[float, float, list[float], Callable[[float], str]]:
    """Range, evenly spaced ticks and their text for a log axis so short that powers of ten would leave it bare."""
    pad = max(1.002, (float(values.max()) / float(values.min())) ** 0.07)
    low, high = float(values.min()) / pad, float(values.max()) * pad
    rough = (high - low) / 6
    power = 10.0 ** np.floor(np.log10(rough))
    step = float(power * next(m for m in (1, 2, 2.5, 5, 10) if m * power >= rough))
    ticks = [float(round(i * step, 10)) for i in range(int(np.ceil(low / step)), int(high / step) + 1)]
    decimals = next(
        d for d in range(1, 11) if d == 10 or all(abs(round(tick, d) - tick) < 1e-9 for tick in ticks)
    )
    return low, high, ticks, lambda value: f"{value:.{decimals}f}"


def budget_label(unit: str) -> str:
    """Axis label of a budget column."""
    return (ITERATIONS if unit == ITERATIONS.column else TOKENS).label


def log_axis(
    axes: Axes, which: str, low: float, high: float, ticks: Sequence[float], text: Callable[[float], str]
) -> None:
    """A drawn logarithmic axis, `which` being x or y, with the ticks given as text in real units and no others."""
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    (axes.set_xlim if which == "x" else axes.set_ylim)(low, high)
    set_ticks(axes, which, ticks, text)


def set_ticks(axes: Axes, which: str, ticks: Sequence[float], text: Callable[[float], str]) -> None:
    """The ticks of a drawn axis, x or y, and no others."""
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(FixedLocator(list(ticks)))
    axis.set_major_formatter(FixedFormatter([text(tick) for tick in ticks]))
    axis.set_minor_locator(NullLocator())


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


def bar(ratio: float, ends: tuple[float, float] | None) -> tuple[float, float]:
    """Ends of an error bar on a log axis: an end at 0 or without limit is cut a hundredfold from the ratio."""
    low, high = ends or (ratio, ratio)
    return min(max(low, ratio / 100), ratio * 100), max(min(high, ratio * 100), ratio / 100)


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
