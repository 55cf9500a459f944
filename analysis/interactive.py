"""The report's interactive figures, as the plain JSON that Plotly's script draws: every point says which run it was.

They are written as data, not through Plotly's Python classes: those take longer to import than the study takes to fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis import traces, wording
from analysis.curves import bar, spreads
from analysis.laws import law_named
from analysis.optimum_figures import CAPTION as OPTIMUM_CAPTION
from analysis.optimum_figures import TITLE as OPTIMUM_TITLE
from analysis.optimum_figures import has_optima, interactive_optima
from analysis.profile_figures import CAPTION as PROFILE_CAPTION
from analysis.profile_figures import flat_parameters, interactive_profiles
from analysis.style import INK, LOSS, budget_label, colour, plain_ticks, shade, shades

if TYPE_CHECKING:
    from analysis.points import CheckedPoints
    from analysis.results import FitDocument

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
    inputs = law_named(document.law).inputs
    figures = []
    if "n_params" in inputs:
        figures.append(_together(scene))
        figures.append(_families(scene, by_size=True))
    if len(inputs) > 1 or "n_params" not in inputs:
        figures.append(_families(scene, by_size=False))
    if wording.ratio_rows(document):
        figures.append(_ratio(scene))
    if has_optima(document):
        data, layout = interactive_optima(scene)
        figures.append(InteractiveFigure("compute_optimal", OPTIMUM_TITLE, OPTIMUM_CAPTION, data, layout))
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
        row = wording.main_row(scene.document, name)
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
    rows = wording.ratio_rows(scene.document)
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
