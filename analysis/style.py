"""What the drawn and the interactive figures share: colours safe for the colour-blind, and ticks in real units."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.law import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
    return "training iterations" if unit == "iterations" else "training tokens"


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
