"""The report's interactive figures, as the plain JSON that Plotly's script draws: every point says which run it was.

They are written as data, not through Plotly's Python classes: those take longer to import than the study takes to fit.

The compute-optimal size against compute by every method, drawn and interactive.

Profiles of the parameters that the points do not tell, drawn and interactive: a flat valley is best seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis import text as wording
from analysis.laws.catalogue import law_named
from analysis.laws.law import Array
from analysis.report import interactive as traces
from analysis.report.headlines import main_row, ratio_rows
from analysis.report.style import (
    INK,
    LOSS,
    PARAMETERS,
    bar,
    budget_label,
    colour,
    log_axis,
    plain_ticks,
    shade,
    shades,
    spreads,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from analysis.findings.results import FitDocument, ProfileCurve
    from analysis.points.table import CheckedPoints

SYMBOLS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x", "star")


@dataclass(frozen=True)
class InteractiveFigure:
    """One figure: an id for its element, a title, a caption in plain words, and Plotly's data and layout."""

    name: str
    title: str
    caption: str
    data: list[traces.Trace]
    layout: dict[str, Any]


def interactive_figures(
    points: CheckedPoints, document: FitDocument, links: Mapping[str, str]
) -> list[InteractiveFigure]:
    """Every figure of the report; `links` maps run ids to addresses opened on a click."""
    scene = traces.Scene(spreads(points, document), document, links)
    inputs = law_named(document.law).columns
    figures = []
    if "n_params" in inputs:
        figures.append(_together(scene))
        figures.append(_families(scene, by_size=True))
    if len(inputs) > 1 or "n_params" not in inputs:
        figures.append(_families(scene, by_size=False))
    if ratio_rows(document):
        figures.append(_ratio(scene))
    if has_optima(document):
        data, layout = interactive_optima(scene)
        figures.append(InteractiveFigure("compute_optimal", TITLE, OPTIMUM_CAPTION, data, layout))
    figures.append(_residuals(scene))
    if flat_parameters(document):
        data, layout = interactive_profiles(scene)
        title = "What the points do not tell"
        figures.append(InteractiveFigure("profiles", title, PROFILE_CAPTION, data, layout))
    return figures


def _together(scene: traces.Scene) -> InteractiveFigure:
    """Both architectures on one pair of axes, the longest budget strong and the others faint."""
    data: list[traces.Trace] = []
    for law in scene.laws:
        base = colour(law.name, scene.names)
        for value in law.budgets:
            strong = value == law.budgets[-1]
            tone = base if strong else shade(base, 0.38)
            rows = law.curve.frame[law.curve.frame[law.budget] == value]
            label = f"{traces.arm(law.name)}, {wording.budget_of(law.budget, float(value))}"
            group = f"{law.name}-{value}"
            ribbon, curve = traces.curve(law.over_sizes(float(value)), label, tone, group, 0)
            data += [ribbon, curve] if strong else [curve]
            data.append(traces.dots(scene, rows, "n_params", tone, "circle", group, 0))
    x_axis, x_title = traces.x_axis(scene, by_size=True)
    losses = np.concatenate([law.curve.frame["loss"].to_numpy(dtype=np.float64) for law in scene.laws])
    for name in scene.names:
        row = main_row(scene.document, name)
        if row is not None and row.n_params is not None and row.estimate is not None:
            x = [row.reference_n_params, row.n_params]
            data.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "x": x,
                    "y": [row.loss, row.loss],
                    "line": {"color": INK, "width": 1.3, "dash": "dot"},
                    "marker": {"symbol": "line-ns-open", "size": 12, "color": INK},
                    "name": f"equal loss: {wording.ratio_in_words(row.estimate)}",
                    "hovertext": [f"{row.loss:.4f} nats at {wording.human(value)} parameters" for value in x],
                    "hoverinfo": "text",
                    "legendrank": 2000,
                }
            )
    return InteractiveFigure(
        name="together",
        title="Both architectures at equal budgets" if len(scene.laws) == 2 else "Loss against size",
        caption="Held-out loss against size. Strong: the longest budget with the law's 95 % interval; faint: the "
        "shorter ones. The dotted line joins the two sizes of equal loss that the headline speaks of.",
        data=data,
        layout=traces.layout(scene, x_axis, x_title, traces.loss_axis(losses), LOSS, panels=1),
    )


def _families(scene: traces.Scene, *, by_size: bool) -> InteractiveFigure:
    data: list[traces.Trace] = []
    unit = scene.laws[0].budget
    for panel, law in enumerate(scene.laws):
        column, fixed = ("n_params", law.budget) if by_size else (law.budget, "n_params")
        held = law.budgets if by_size else law.sizes
        tones = shades(colour(law.name, scene.names), len(held))
        for i, value in enumerate(held):
            line = law.over_sizes(float(value)) if by_size else law.over_budgets(float(value))
            rows = law.curve.frame[law.curve.frame[fixed] == value]
            held_text = (
                wording.budget_of(fixed, float(value)) if by_size else f"{wording.human(value)} parameters"
            )
            label = f"{traces.arm(law.name)}, {held_text}"
            group = f"{law.name}-{i}"
            data += traces.curve(line, label, tones[i], group, panel)
            data.append(traces.dots(scene, rows, column, tones[i], SYMBOLS[i % 8], group, panel))
        fit = scene.document.architectures[law.name].heldout
        split = fit.largest_size if by_size else fit.longest_budget
        if split is not None:
            x = [getattr(point, column) for point in split.points]
            text = [
                f"{traces.plain(point.run_id)}: {wording.percent(point.relative_error)} predicted without it"
                for point in split.points
            ]
            data.append(
                traces.marks(
                    x,
                    [p.predicted for p in split.points],
                    text,
                    "x-thin-open",
                    "predicted without them",
                    panel,
                )
            )
            ring = ["left out for the held-out error"] * len(x)
            data.append(
                traces.marks(
                    x, [p.loss for p in split.points], ring, "circle-open", "left out", panel, size=15
                )
            )
    x_axis, x_title = traces.x_axis(scene, by_size=by_size)
    losses = np.concatenate([law.curve.frame["loss"].to_numpy(dtype=np.float64) for law in scene.laws])
    layout = traces.layout(scene, x_axis, x_title, traces.loss_axis(losses), LOSS)
    where = "the largest size" if by_size else "the longest budget"
    kept = f"{'iteration counts' if unit == 'iterations' else 'token counts'}" if by_size else "sizes"
    return InteractiveFigure(
        name="loss_vs_parameters" if by_size else "loss_vs_budget",
        title="Loss against parameters" if by_size else f"Loss against {budget_label(unit)}",
        caption=f"Every point and every seed. Lines: the fitted law, one for each of the {kept}; ribbons: its 95 % "
        f"interval. Rings mark {where}, which was left out once; crosses are what the law fitted without it predicts.",
        data=data,
        layout=layout,
    )


def _ratio(scene: traces.Scene) -> InteractiveFigure:
    comparison = scene.document.comparison
    rows = ratio_rows(scene.document)
    largest = rows[0].reference_n_params
    unit = "iterations" if rows[0].iterations is not None else "tokens"
    data: list[traces.Trace] = []
    reach = [1.0]
    for name in dict.fromkeys(row.architecture for row in rows):
        own = [row for row in rows if row.architecture == name]
        ratios = [float(row.estimate or 0.0) for row in own]
        ends = [bar(ratio, row.estimate_ci95) for row, ratio in zip(own, ratios, strict=True)]
        reach += ratios + [max(low, ratio / 10) for (low, _), ratio in zip(ends, ratios, strict=True)]
        reach += [min(high, ratio * 10) for (_, high), ratio in zip(ends, ratios, strict=True)]
        tone = colour(name, scene.names)
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": f"{traces.arm(name)}, 95 % interval",
                "x": [row.iterations or row.tokens for row in own],
                "y": ratios,
                "error_y": {
                    "type": "data",
                    "symmetric": False,
                    "array": [max(0.0, high - ratio) for (_, high), ratio in zip(ends, ratios, strict=True)],
                    "arrayminus": [
                        max(0.0, ratio - low) for (low, _), ratio in zip(ends, ratios, strict=True)
                    ],
                    "color": tone,
                    "thickness": 2,
                    "width": 6,
                },
                "marker": {
                    "color": tone,
                    "size": 11,
                    "symbol": ["circle" if row.status == "identified" else "circle-open" for row in own],
                    "line": {"width": 2, "color": tone},
                },
                "hovertext": [
                    f"{wording.times(ratio)}× {wording.between(row.estimate_ci95, 2)}<br>{row.status}<br>at a loss of "
                    f"{row.loss:.4f} nats: {wording.human(row.n_params or 0)} parameters"
                    for row, ratio in zip(own, ratios, strict=True)
                ],
                "hoverinfo": "text",
            }
        )
    budgets = sorted({float(row.iterations or row.tokens) for row in rows})
    data.append(
        {
            "type": "scatter",
            "mode": "lines",
            "x": [budgets[0] / 1.25, budgets[-1] * 1.25],
            "y": [1, 1],
            "line": {"color": traces.GREY, "dash": "dash", "width": 1.5},
            "name": "equal size",
            "hoverinfo": "skip",
        }
    )
    low, high = min(reach) / 1.4, max(reach) * 1.4
    text = (lambda v: f"{v:,.0f}") if unit == "iterations" else wording.human
    x_axis = traces.log_axis(
        budgets[0] / 1.25,
        budgets[-1] * 1.25,
        budgets if len(budgets) <= 8 else plain_ticks(budgets[0], budgets[-1]),
        text,
    )
    y_axis = traces.log_axis(low, high, plain_ticks(low, high), lambda v: f"{v:g}×")
    layout = traces.layout(
        scene, x_axis, budget_label(unit), y_axis, "size ratio (times fewer parameters)", panels=1
    )
    return InteractiveFigure(
        name="size_ratio",
        title=f"Size ratio to the {wording.human(largest)}-parameter {wording.architecture(comparison.reference)}",
        caption="How many times fewer parameters reach the same loss at the same budget; above 1 the architecture is "
        "the smaller one. Bars: 95 % interval. Hollow: the equal size lies outside the sizes trained.",
        data=data,
        layout=layout,
    )


def _residuals(scene: traces.Scene) -> InteractiveFigure:
    data: list[traces.Trace] = []
    for panel, law in enumerate(scene.laws):
        frame = law.curve.frame
        error = 100 * (frame["loss"].to_numpy(dtype=np.float64) / law.fitted() - 1)
        tone = colour(law.name, scene.names)
        dots = traces.dots(scene, frame, "n_params", tone, "circle", f"{law.name}-in", panel, y=error)
        dots |= {"name": f"{traces.arm(law.name)}, fitted", "showlegend": True}
        data.append(dots)
        heldout = scene.document.architectures[law.name].heldout
        for split, symbol, label in (
            (heldout.largest_size, "diamond-open", "held out: largest size"),
            (heldout.longest_budget, "square-open", "held out: longest budget"),
        ):
            if split is not None:
                y = [100 * (point.loss / point.predicted - 1) for point in split.points]
                text = [f"{traces.plain(point.run_id)}<br>{label}" for point in split.points]
                data.append(
                    traces.marks(
                        [point.n_params for point in split.points], y, text, symbol, label, panel, size=11
                    )
                )
    x_axis, x_title = traces.x_axis(scene, by_size=True)
    y_axis = {"zeroline": True, "zerolinecolor": traces.GREY, "zerolinewidth": 1.5, "ticksuffix": " %"}
    return InteractiveFigure(
        name="residuals",
        title="What the law misses",
        caption="Loss seen above the loss of the law, for points the fit has seen and, hollow, for points it had not.",
        data=data,
        layout=traces.layout(scene, x_axis, x_title, y_axis, "seen above the law (%)"),
    )


FLOPS = "training FLOPs"
TITLE = "Compute-optimal size"
OPTIMUM_CAPTION = (
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


GREEK = {"alpha": "α", "beta": "β"}
COLUMNS = 3
HEIGHT = 6.0  # how far above its minimum a profile is shown, in units of what its interval allows
ALLOWED = "end of the 95 % interval"
MEASURE = "objective above its minimum (interval ends at 1)"
PROFILE_CAPTION = (
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
        axes.set_title(GREEK.get(parameter, parameter))
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
        axis |= {"title": {"text": GREEK.get(parameter, parameter)}, "nticks": 5}
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
