"""Colours that colour-blind readers can tell apart, markers, and axes with ticks in real units."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import get_args

import numpy as np

from analysis.laws.law import ITERATIONS, TOKENS, Array
from analysis.report.description import Axis, Marker

# Okabe and Ito's palette; an architecture has the same colour everywhere.
COLOURS = {
    "cross_transformer": "#0072B2",
    "prefix_simba": "#D55E00",
    "cross_simba": "#009E73",
    "prefix_mamba": "#CC79A7",
}
OTHERS = ("#E69F00", "#56B4E9", "#000000", "#8C6D31", "#5B5B5B")
MARKERS: tuple[Marker, ...] = get_args(Marker)[:8]
INK, GREY, GRID = "#1F2933", "#7B8794", "#E4E7EB"


def colour(name: str, names: Sequence[str]) -> str:
    """Return the architecture's colour, the same in every figure."""
    others = sorted(set(names) - set(COLOURS))
    return COLOURS.get(name) or OTHERS[others.index(name) % len(OTHERS)]


def shade(base: str, share: float) -> str:
    """Mix a colour with white: share 1 returns the colour itself, 0 white."""
    parts = [int(base[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(255 - share * (255 - part)):02X}" for part in parts)


def shades(base: str, count: int) -> list[str]:
    """Return `count` shades of a colour, from light to full."""
    return [shade(base, share) for share in (np.linspace(0.42, 1.0, count) if count > 1 else [1.0])]


def plain_ticks(low: float, high: float) -> list[float]:
    """Return ticks at 1, 2 and 5 times powers of ten within the range, or at powers of ten if it spans many."""
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
    """Return a logarithmic axis over the values and `pad` times more, with ticks at round values or `at` these."""
    reach = list(values)
    low, high = min(reach) / pad, max(reach) * pad
    ticks = list(at) or plain_ticks(low, high)
    ticks = ticks[:: -(-len(ticks) // most)]
    return Axis(label, (low, high), log=True, ticks=tuple((tick, text(tick)) for tick in ticks))


def loss_axis(losses: Array) -> Axis:
    """Return a logarithmic axis of losses, so short that its ticks are evenly spaced and not at powers of ten."""
    pad = max(1.002, (float(losses.max()) / float(losses.min())) ** 0.07)
    low, high = float(losses.min()) / pad, float(losses.max()) * pad
    rough = (high - low) / 6
    power = 10.0 ** np.floor(np.log10(rough))
    step = float(power * next(m for m in (1, 2, 2.5, 5, 10) if m * power >= rough))
    ticks = [float(round(i * step, 10)) for i in range(int(np.ceil(low / step)), int(high / step) + 1)]
    exact = (d for d in range(1, 10) if all(abs(round(tick, d) - tick) < 1e-9 for tick in ticks))
    decimals = next(exact, 10)
    labelled = tuple((tick, f"{tick:.{decimals}f}") for tick in ticks)
    return Axis("held-out loss (nats a token)", (low, high), log=True, ticks=labelled)


def budget_label(unit: str) -> str:
    """Return the axis label of a budget column."""
    return (ITERATIONS if unit == ITERATIONS.column else TOKENS).label
