"""Profiles of the parameters that the points do not tell, drawn and interactive: a flat valley is best seen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from analysis import traces, wording
from analysis.law import Array
from analysis.style import INK, colour, log_axis, plain_ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from analysis.results import FitDocument, ProfileCurve

SYMBOLS = {"alpha": "α", "beta": "β"}
COLUMNS = 3
HEIGHT = 6.0  # how far above its minimum a profile is shown, in units of what its interval allows
ALLOWED = "end of the 95 % interval"
MEASURE = "objective above its minimum (interval ends at 1)"
CAPTION = (
    "Objective minimised over all other parameters, for each parameter whose profile stays flat towards an end: "
    "above its minimum, in units of what the nominal 95 % interval allows. Where a curve leaves the figure below the "
    "dashed line, the points put no end to the parameter there. Dots: the estimates."
)


def flat_parameters(document: FitDocument) -> list[str]:
    """Parameters whose profile has an open end in some architecture."""
    fits = document.architectures.values()
    names = dict.fromkeys(name for fit in fits for name in fit.profile)
    return [name for name in names if any(_flat(fit.profile.get(name)) for fit in fits)]


def draw_profiles(figure: Figure, document: FitDocument) -> None:
    """A panel a flat parameter, a curve an architecture."""
    shown, names = flat_parameters(document), list(document.architectures)
    rows, columns = _grid(len(shown))
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    for spare in panels[len(shown) :]:
        spare.set_visible(False)
    for axes, parameter in zip(panels, shown, strict=False):
        for name, fit in document.architectures.items():
            curve = fit.profile.get(parameter)
            if curve is None:
                continue
            tone = colour(name, names)
            axes.plot(curve.values, _height(curve), color=tone, lw=2, label=wording.architecture(name))
            axes.plot(fit.params[parameter], 0, "o", color=tone, ms=7, mec="white", zorder=4, clip_on=False)
        axes.axhline(1.0, color=INK, lw=1.1, ls=(0, (4, 3)), label=ALLOWED)
        if parameter != "E":
            ends = [
                end for curve in _curves(document, parameter) for end in (curve.values[0], curve.values[-1])
            ]
            ticks = plain_ticks(min(ends), max(ends))
            ticks = ticks[:: -(-len(ticks) // 4)]
            log_axis(axes, "x", min(ends), max(ends), ticks, lambda value: wording.number(value, 1))
        axes.set_ylim(0, HEIGHT)
        axes.set_title(SYMBOLS.get(parameter, parameter))
        axes.tick_params(axis="x", which="both", labelsize=8.5)
    panels[0].set_ylabel(MEASURE if rows == 1 else "objective above its minimum")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8.5)


def size(document: FitDocument) -> tuple[float, float]:
    """Width and height of the drawn figure in inches."""
    rows, columns = _grid(len(flat_parameters(document)))
    return 3.4 * max(2, columns), 3.2 * rows + 0.6


def interactive_profiles(scene: traces.Scene) -> tuple[list[traces.Trace], dict[str, Any]]:
    """The same as Plotly's data and layout, the panels side by side."""
    document = scene.document
    shown = flat_parameters(document)
    data: list[traces.Trace] = []
    for panel, parameter in enumerate(shown):
        axes = {} if panel == 0 else {"xaxis": f"x{panel + 1}", "yaxis": f"y{panel + 1}"}
        ends: list[float] = []
        for name, fit in document.architectures.items():
            curve = fit.profile.get(parameter)
            if curve is None:
                continue
            tone, ends = colour(name, scene.names), [*ends, curve.values[0], curve.values[-1]]
            base = {"type": "scatter", "legendgroup": name, **axes}
            line = {"mode": "lines", "x": list(curve.values), "y": _height(curve).tolist(), "hoverinfo": "x"}
            data.append(
                {**base, **line, "name": traces.arm(name), "line": {"color": tone}, "showlegend": panel == 0}
            )
            dot = {"mode": "markers", "x": [fit.params[parameter]], "y": [0.0], "showlegend": False}
            text = f"{parameter} = {wording.number(fit.params[parameter], 4)}"
            marker = {"color": tone, "size": 9, "line": {"color": "white", "width": 1}}
            data.append({**base, **dot, "marker": marker, "hoverinfo": "text", "hovertext": [text]})
        dash = {"type": "scatter", "mode": "lines", "x": [min(ends), max(ends)], "y": [1.0, 1.0], **axes}
        look = {"line": {"color": INK, "dash": "dash", "width": 1.2}, "hoverinfo": "skip"}
        data.append({**dash, **look, "name": ALLOWED, "legendgroup": ALLOWED, "showlegend": panel == 0})
    layout = traces.layout(scene, {}, "", {"range": [0, HEIGHT]}, MEASURE, panels=len(shown))
    for panel, parameter in enumerate(shown):
        axis = layout["xaxis" if panel == 0 else f"xaxis{panel + 1}"]
        axis |= {"title": {"text": SYMBOLS.get(parameter, parameter)}, "nticks": 5}
        if parameter != "E":
            axis |= {"type": "log"}
    return data, layout


def _grid(count: int) -> tuple[int, int]:
    """Rows and columns of so many panels, filled as evenly as may be."""
    rows = -(-count // COLUMNS)
    return rows, -(-count // rows)


def _curves(document: FitDocument, parameter: str) -> list[ProfileCurve]:
    return [fit.profile[parameter] for fit in document.architectures.values() if parameter in fit.profile]


def _flat(curve: ProfileCurve | None) -> bool:
    return curve is not None and None in curve.interval


def _height(curve: ProfileCurve) -> Array:
    lowest = min(curve.objective)
    room = max(curve.allowed - lowest, 1e-300)
    out: Array = np.minimum((np.array(curve.objective) - lowest) / room, 1e3)
    return out
