"""The compute-optimal size against compute by every method, drawn and interactive."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from analysis import traces, wording
from analysis.style import INK, PARAMETERS, colour, log_axis, plain_ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from analysis.results import FitDocument

FLOPS = "training FLOPs"
TITLE = "Compute-optimal size"
CAPTION = (
    "Lines: the size that the fitted law calls best for so much compute. Dots: the lowest point of a parabola through "
    "the losses at equal compute, its bias off centre taken off; hollow where the sizes lie to one side of it or the "
    "bias was above a tenth. Crosses: the best of the trained sizes. Where the three part, believe none of them far."
)


def has_optima(document: FitDocument) -> bool:
    """Whether any architecture was trained so that its best size can be looked for."""
    return any(found.optima for found in document.isoflop.values())


def draw_optima(figure: Figure, document: FitDocument) -> None:
    """Best size against FLOPs: law, corrected parabolas, envelope."""
    axes = figure.subplots()
    names = list(document.architectures)
    for name, found in document.isoflop.items():
        if not found.optima:
            continue
        tone = colour(name, names)
        flops = [one.flops for one in found.optima]
        axes.plot(
            flops, [one.parametric for one in found.optima], color=tone, lw=2, label=_label(document, name)
        )
        for one in found.optima:
            if one.corrected is not None:
                inner = tone if one.standing == "centred" else "white"
                axes.plot(one.flops, one.corrected, "o", ms=7, color=tone, mfc=inner, mew=1.5, zorder=4)
            if one.envelope is not None:
                axes.plot(one.flops, one.envelope, "x", ms=6, color=tone, mew=1.4, zorder=3)
    for marker, text in (("o", "IsoFLOP parabola, corrected"), ("x", "best trained size")):
        axes.plot([], [], marker, color=INK, ms=6, label=text)
    axes.plot([], [], "o", color=INK, mfc="white", ms=6, label="hollow: off centre")
    x_axis, y_axis = _ranges(document)
    log_axis(axes, "x", *x_axis, _power)
    log_axis(axes, "y", *y_axis, wording.human)
    axes.set_xlabel(FLOPS)
    axes.set_ylabel(PARAMETERS)
    axes.set_title(f"{TITLE}, by law, parabola and envelope")
    axes.legend(loc="best")


def interactive_optima(scene: traces.Scene) -> tuple[list[traces.Trace], dict[str, Any]]:
    """The same as Plotly's data and layout."""
    document = scene.document
    data: list[traces.Trace] = []
    for name, found in document.isoflop.items():
        if not found.optima:
            continue
        tone, label = colour(name, scene.names), traces.plain(_label(document, name))
        base = {"type": "scatter", "legendgroup": name, "hoverinfo": "text"}
        x = [one.flops for one in found.optima]
        law = [one.parametric for one in found.optima]
        text = [
            f"law: {wording.human(n)} parameters at {wording.number(c)} FLOPs"
            for n, c in zip(law, x, strict=True)
        ]
        line = {"mode": "lines", "x": x, "y": law, "name": label, "line": {"color": tone, "width": 2}}
        data.append({**base, **line, "hovertext": text})
        dots = [one for one in found.optima if one.corrected is not None]
        data.append(
            {
                **base,
                "mode": "markers",
                "x": [one.flops for one in dots],
                "y": [one.corrected for one in dots],
                "name": f"{traces.arm(name)}, IsoFLOP parabola",
                "marker": {
                    "color": tone,
                    "size": 10,
                    "symbol": ["circle" if one.standing == "centred" else "circle-open" for one in dots],
                    "line": {"width": 2, "color": tone},
                },
                "hovertext": [
                    f"parabola through {one.sizes} sizes: {wording.human(one.corrected or 0)}, before correction "
                    f"{wording.human(one.isoflop or 0)}<br>{one.standing.replace('_', ' ')}"
                    for one in dots
                ],
            }
        )
        best = [one for one in found.optima if one.envelope is not None]
        data.append(
            {
                **base,
                "mode": "markers",
                "x": [one.flops for one in best],
                "y": [one.envelope for one in best],
                "name": f"{traces.arm(name)}, best trained size",
                "marker": {
                    "color": tone,
                    "size": 9,
                    "symbol": "x-thin-open",
                    "line": {"width": 2, "color": tone},
                },
                "hovertext": [f"best trained size: {wording.human(one.envelope or 0)}" for one in best],
            }
        )
    (x_low, x_high, x_ticks), (y_low, y_high, y_ticks) = _ranges(document)
    layout = traces.layout(
        scene,
        traces.log_axis(x_low, x_high, x_ticks, _power),
        FLOPS,
        traces.log_axis(y_low, y_high, y_ticks, wording.human),
        PARAMETERS,
        panels=1,
    )
    return data, layout


def _label(document: FitDocument, name: str) -> str:
    one = document.isoflop[name].exponents.get("parametric")
    return wording.architecture(name) + ("" if one is None else f", law: N ∝ C^{one.value:.2f}")


def _power(value: float) -> str:
    return wording.number(value, 1) if value >= 1e6 else f"{value:g}"


def _ranges(
    document: FitDocument,
) -> tuple[tuple[float, float, list[float]], tuple[float, float, list[float]]]:
    optima = [one for found in document.isoflop.values() for one in found.optima]
    flops = np.array([one.flops for one in optima])
    sizes = np.array([n for one in optima for n in (one.parametric, one.corrected, one.envelope) if n])
    out = []
    for values in (flops, sizes):
        low, high = float(values.min()) / 1.4, float(values.max()) * 1.4
        ticks = plain_ticks(low, high)
        out.append((low, high, ticks[:: -(-len(ticks) // 8)]))
    return out[0], out[1]
