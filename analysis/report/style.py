"""Colours safe for the colour-blind, markers, and ticks in real units."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from analysis.laws.law import ITERATIONS, TOKENS, Array
from analysis.report.description import Axis, Marker, labelled

# Okabe and Ito's palette, one colour an architecture wherever it appears.
COLOURS = {
    "cross_transformer": "#0072B2",
    "prefix_simba": "#D55E00",
    "cross_simba": "#009E73",
    "prefix_mamba": "#CC79A7",
}
OTHERS = ("#E69F00", "#56B4E9", "#000000", "#8C6D31", "#5B5B5B")
MARKERS: tuple[Marker, ...] = (
    "circle",
    "square",
    "triangle-up",
    "diamond",
    "triangle-down",
    "cross",
    "x",
    "star",
)
INK, GREY, GRID = "#1F2933", "#7B8794", "#E4E7EB"


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


def log_axis(
    label: str,
    values: Iterable[float],
    text: Callable[[float], str],
    *,
    pad: float,
    at: Sequence[float] = (),
    most: int = 8,
) -> Axis:
    """A logarithmic axis over the values and `pad` times more, with ticks at round values or `at` these."""
    reach = list(values)
    low, high = min(reach) / pad, max(reach) * pad
    ticks = list(at) or plain_ticks(low, high)
    return Axis(label, (low, high), log=True, ticks=labelled(ticks[:: -(-len(ticks) // most)], text))


def loss_axis(losses: Array) -> Axis:
    """A logarithmic axis of losses with ticks evenly spaced: it is so short that powers of ten would leave it bare."""
    pad = max(1.002, (float(losses.max()) / float(losses.min())) ** 0.07)
    low, high = float(losses.min()) / pad, float(losses.max()) * pad
    rough = (high - low) / 6
    power = 10.0 ** np.floor(np.log10(rough))
    step = float(power * next(m for m in (1, 2, 2.5, 5, 10) if m * power >= rough))
    ticks = [float(round(i * step, 10)) for i in range(int(np.ceil(low / step)), int(high / step) + 1)]
    decimals = next(
        d for d in range(1, 11) if d == 10 or all(abs(round(tick, d) - tick) < 1e-9 for tick in ticks)
    )
    texts = labelled(ticks, lambda value: f"{value:.{decimals}f}")
    return Axis("held-out loss (nats a token)", (low, high), log=True, ticks=texts)


def budget_label(unit: str) -> str:
    """Axis label of a budget column."""
    return (ITERATIONS if unit == ITERATIONS.column else TOKENS).label
