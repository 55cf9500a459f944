"""Colours that colour-blind readers can tell apart, markers, and axes with ticks in real units."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import get_args

import numpy as np

from analysis.laws.law import ITERATIONS, TOKENS, Array
from analysis.report.description import Axis, Marker

# Okabe and Ito's palette less its yellow, and five colours that stay furthest from it for readers with and without
# colour blindness (Machado, Oliveira and Fernandes 2009, full severity). An architecture has the same look everywhere.
NAMED = ("cross_transformer", "prefix_simba", "cross_simba", "prefix_mamba")
COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7"),
    *("#E69F00", "#56B4E9", "#000000", "#8800FF", "#99CC77", "#771155", "#443300", "#110088"),
)
MARKERS: tuple[Marker, ...] = get_args(Marker)[:12]
LEVEL_MARKERS = MARKERS[:8]
INK, GREY, GRID = "#1F2933", "#7B8794", "#E4E7EB"

TRIANGLE = ((0, 1), (0.9, -0.75), (-0.9, -0.75))
CROSS = tuple(
    (x, y)
    for x, y in (
        *((0.35, 1), (0.35, 0.35), (1, 0.35), (1, -0.35), (0.35, -0.35), (0.35, -1)),
        *((-0.35, -1), (-0.35, -0.35), (-1, -0.35), (-1, 0.35), (-0.35, 0.35), (-0.35, 1)),
    )
)
SHAPES: dict[Marker, Sequence[tuple[float, float]]] = {
    "square": ((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)),
    "triangle-up": TRIANGLE,
    "diamond": ((0, 1.1), (1.1, 0), (0, -1.1), (-1.1, 0)),
    "triangle-down": tuple((x, -y) for x, y in TRIANGLE),
    "cross": CROSS,
    "x": tuple(((x - y) * 0.7071, (x + y) * 0.7071) for x, y in CROSS),
    "star": tuple(
        (float(reach * np.sin(k * np.pi / 5)), float(reach * np.cos(k * np.pi / 5)))
        for k in range(10)
        for reach in [0.45 if k % 2 else 1.15]
    ),
    "hourglass": ((-0.9, -1), (0.9, -1), (-0.9, 1), (0.9, 1)),
    "bowtie": ((-1, -0.9), (-1, 0.9), (1, -0.9), (1, 0.9)),
    "triangle-left": tuple((-y, x) for x, y in TRIANGLE),
    "triangle-right": tuple((y, x) for x, y in TRIANGLE),
}
"""Corners of each filled marker but the circle, in units of its radius, y upwards."""


def look(name: str, names: Sequence[str]) -> tuple[str, Marker]:
    """Return the colour and the marker of an architecture among `names`, the same in every figure.

    Up to 12 architectures differ in both. Of more, no two have the same pair.
    """
    known = list(dict.fromkeys([*names, name]))
    free = [place for place, own in enumerate(NAMED + ("",) * 8) if own not in known]
    others = [one for one in known if one not in NAMED]
    if name in NAMED:
        place = NAMED.index(name)
    else:
        number = others.index(name)
        # Colours kept for named architectures come last, so that these look alike in all studies.
        order = [*(one for one in free if one >= len(NAMED)), *(one for one in free if one < len(NAMED))]
        place = order[number] if number < len(order) else len(NAMED) + 8 + number - len(order)
    turn, place = divmod(place, len(COLOURS))
    return COLOURS[place], MARKERS[(place + turn) % len(MARKERS)]


def colour(name: str, names: Sequence[str]) -> str:
    """Return the colour of an architecture among `names`."""
    return look(name, names)[0]


LONG = 12.0
"""Factor between the ends of an axis of losses from which on its ticks are at 1, 2 and 5 times powers of ten."""


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
    """Return a logarithmic axis of losses, with evenly spaced ticks unless it is very long."""
    label = "loss (nats a token)"
    pad = max(1.002, (float(losses.max()) / float(losses.min())) ** 0.07)
    low, high = float(losses.min()) / pad, float(losses.max()) * pad
    if high / low > LONG:
        return log_axis(label, [low, high], lambda value: f"{value:g}", pad=1)
    rough = (high - low) / 6
    power = 10.0 ** np.floor(np.log10(rough))
    step = float(power * next(m for m in (1, 2, 2.5, 5, 10) if m * power >= rough))
    ticks = [float(round(i * step, 10)) for i in range(int(np.ceil(low / step)), int(high / step) + 1)]
    exact = (d for d in range(1, 10) if all(abs(round(tick, d) - tick) < 1e-9 for tick in ticks))
    decimals = next(exact, 10)
    labelled = tuple((tick, f"{tick:.{decimals}f}") for tick in ticks)
    return Axis(label, (low, high), log=True, ticks=labelled)


def power(value: float) -> str:
    """Write a large round number for a tick, as short as can be: 2·10¹³."""
    if value < 1e6:
        return f"{value:g}"
    digit, _, exponent = f"{value:.0e}".partition("e")
    raised = str(int(exponent)).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{raised}" if digit == "1" else f"{digit}·10{raised}"


def apart(axis: Axis, length: float, size: float) -> list[tuple[float, str]]:
    """Return the ticks whose texts, `size` points high, fit without overlap on an axis so many points long.

    Texts stand side by side along a horizontal axis; a size of 0 is that of lines above each other.
    """
    if axis.limits is None:
        return list(axis.ticks)
    scale = np.log if axis.log else np.asarray
    low, high = (float(scale(end)) for end in axis.limits)
    kept: list[tuple[float, str]] = []
    end = -np.inf
    for at, text in axis.ticks:
        middle = length * (float(scale(at)) - low) / (high - low)
        half = 0.32 * size * len(text) + 3 if size else 7.0
        if middle - half >= end:
            kept.append((at, text))
            end = middle + half
    return kept


def budget_label(unit: str) -> str:
    """Return the axis label of a budget column."""
    return (ITERATIONS if unit == ITERATIONS.column else TOKENS).label
