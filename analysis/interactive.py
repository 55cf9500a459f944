"""The report's interactive figures, as the plain JSON that Plotly's script draws: every point says which run it was.

They are written as data, not through Plotly's Python classes: those take longer to import than the study takes to fit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis import wording
from analysis.curves import Line, Spread, bar, spreads
from analysis.laws import Array, law_named
from analysis.plots import (
    INK,
    LOSS,
    budget_label,
    colour,
    fitted_loss,
    linear_ticks,
    plain_ticks,
    shade,
    shades,
)

if TYPE_CHECKING:
    import pandas as pd

    from analysis.document import FitDocument
    from analysis.points import CheckedPoints

Trace = dict[str, Any]
SYMBOLS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x", "star")
GREY = "#9AA5B1"


@dataclass(frozen=True)
class InteractiveFigure:
    """One figure: an id for its element, a title, a caption in plain words, and Plotly's data and layout."""

    name: str
    title: str
    caption: str
    data: list[Trace]
    layout: dict[str, Any]


@dataclass(frozen=True)
class _Scene:
    laws: Sequence[Spread]
    document: FitDocument
    links: Mapping[str, str]

    @property
    def names(self) -> list[str]:
        return [law.name for law in self.laws]


def interactive_figures(
    points: CheckedPoints, document: FitDocument, links: Mapping[str, str]
) -> list[InteractiveFigure]:
    """Every figure of the report; `links` maps run ids to addresses opened on a click."""
    scene = _Scene(spreads(points, document), document, links)
    inputs = law_named(document.law).inputs
    figures = []
    if "n_params" in inputs:
        figures.append(_together(scene))
        figures.append(_families(scene, by_size=True))
    if len(inputs) == 2 or "n_params" not in inputs:
        figures.append(_families(scene, by_size=False))
    if wording.ratio_rows(document):
        figures.append(_ratio(scene))
    figures.append(_residuals(scene))
    return figures


def _together(scene: _Scene) -> InteractiveFigure:
    """Both architectures on one pair of axes, the longest budget strong and the others faint."""
    data: list[Trace] = []
    for law in scene.laws:
        base = colour(law.name, scene.names)
        for value in law.budgets:
            strong = value == law.budgets[-1]
            tone = base if strong else shade(base, 0.38)
            rows = law.curve.frame[law.curve.frame[law.budget] == value]
            label = f"{_arm(law.name)}, {wording.budget_of(law.budget, float(value))}"
            group = f"{law.name}-{value}"
            ribbon, curve = _curve(law.over_sizes(float(value)), label, tone, group, 0)
            data += [ribbon, curve] if strong else [curve]
            data.append(_dots(scene, rows, "n_params", tone, "circle", group, 0))
    x_axis, x_title = _x_axis(scene, by_size=True)
    losses = np.concatenate([law.curve.frame["loss"].to_numpy(dtype=np.float64) for law in scene.laws])
    for name in scene.names:
        row = wording.main_row(scene.document, name)
        if row is not None and row.n_params is not None and row.ratio is not None:
            x = [row.reference_n_params, row.n_params]
            data.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "x": x,
                    "y": [row.loss, row.loss],
                    "line": {"color": INK, "width": 1.3, "dash": "dot"},
                    "marker": {"symbol": "line-ns-open", "size": 12, "color": INK},
                    "name": f"equal loss: {wording.ratio_in_words(row.ratio)}",
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
        layout=_layout(scene, x_axis, x_title, _loss_axis(losses), LOSS, panels=1),
    )


def _families(scene: _Scene, *, by_size: bool) -> InteractiveFigure:
    data: list[Trace] = []
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
            label = f"{_arm(law.name)}, {held_text}"
            group = f"{law.name}-{i}"
            data += _curve(line, label, tones[i], group, panel)
            data.append(_dots(scene, rows, column, tones[i], SYMBOLS[i % 8], group, panel))
        fit = scene.document.architectures[law.name].heldout
        split = fit.largest_size if by_size else fit.longest_budget
        if split is not None:
            x = [getattr(point, column) for point in split.points]
            text = [
                f"{_plain(point.run_id)}: {wording.percent(point.relative_error)} predicted without it"
                for point in split.points
            ]
            data.append(
                _marks(
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
                _marks(x, [p.loss for p in split.points], ring, "circle-open", "left out", panel, size=15)
            )
    x_axis, x_title = _x_axis(scene, by_size=by_size)
    losses = np.concatenate([law.curve.frame["loss"].to_numpy(dtype=np.float64) for law in scene.laws])
    layout = _layout(scene, x_axis, x_title, _loss_axis(losses), LOSS)
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


def _ratio(scene: _Scene) -> InteractiveFigure:
    comparison = scene.document.comparison
    rows = wording.ratio_rows(scene.document)
    largest = rows[0].reference_n_params
    unit = "iterations" if rows[0].iterations is not None else "tokens"
    data: list[Trace] = []
    reach = [1.0]
    for name in dict.fromkeys(row.architecture for row in rows):
        own = [row for row in rows if row.architecture == name]
        ratios = [float(row.ratio or 0.0) for row in own]
        ends = [bar(ratio, row.ci95) for row, ratio in zip(own, ratios, strict=True)]
        reach += ratios + [max(low, ratio / 10) for (low, _), ratio in zip(ends, ratios, strict=True)]
        reach += [min(high, ratio * 10) for (_, high), ratio in zip(ends, ratios, strict=True)]
        tone = colour(name, scene.names)
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": f"{_arm(name)}, 95 % interval",
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
                    f"{wording.times(ratio)}× {wording.between(row.ci95, 2)}<br>{row.status}<br>at a loss of "
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
            "line": {"color": GREY, "dash": "dash", "width": 1.5},
            "name": "equal size",
            "hoverinfo": "skip",
        }
    )
    low, high = min(reach) / 1.4, max(reach) * 1.4
    text = (lambda v: f"{v:,.0f}") if unit == "iterations" else wording.human
    x_axis = _log_axis(
        budgets[0] / 1.25,
        budgets[-1] * 1.25,
        budgets if len(budgets) <= 8 else plain_ticks(budgets[0], budgets[-1]),
        text,
    )
    y_axis = _log_axis(low, high, plain_ticks(low, high), lambda v: f"{v:g}×")
    layout = _layout(
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


def _residuals(scene: _Scene) -> InteractiveFigure:
    data: list[Trace] = []
    for panel, law in enumerate(scene.laws):
        frame = law.curve.frame
        error = 100 * (frame["loss"].to_numpy(dtype=np.float64) / fitted_loss(law) - 1)
        tone = colour(law.name, scene.names)
        dots = _dots(scene, frame, "n_params", tone, "circle", f"{law.name}-in", panel, y=error)
        dots |= {"name": f"{_arm(law.name)}, fitted", "showlegend": True}
        data.append(dots)
        heldout = scene.document.architectures[law.name].heldout
        for split, symbol, label in (
            (heldout.largest_size, "diamond-open", "held out: largest size"),
            (heldout.longest_budget, "square-open", "held out: longest budget"),
        ):
            if split is not None:
                y = [100 * (point.loss / point.predicted - 1) for point in split.points]
                text = [f"{_plain(point.run_id)}<br>{label}" for point in split.points]
                data.append(
                    _marks([point.n_params for point in split.points], y, text, symbol, label, panel, size=11)
                )
    x_axis, x_title = _x_axis(scene, by_size=True)
    y_axis = {"zeroline": True, "zerolinecolor": GREY, "zerolinewidth": 1.5, "ticksuffix": " %"}
    return InteractiveFigure(
        name="residuals",
        title="What the law misses",
        caption="Loss seen above the loss of the law, for points the fit has seen and, hollow, for points it had not.",
        data=data,
        layout=_layout(scene, x_axis, x_title, y_axis, "seen above the law (%)"),
    )


def _curve(line: Line, label: str, tone: str, group: str, panel: int) -> list[Trace]:
    axes = _axes(panel)
    ribbon = {
        "type": "scatter",
        "mode": "lines",
        "x": [*line.x.tolist(), *line.x[::-1].tolist()],
        "y": [*line.high.tolist(), *line.low[::-1].tolist()],
        "fill": "toself",
        "fillcolor": _see_through(tone, 0.14),
        "line": {"width": 0},
        "hoverinfo": "skip",
        "showlegend": False,
        "legendgroup": group,
        **axes,
    }
    curve = {
        "type": "scatter",
        "mode": "lines",
        "x": line.x.tolist(),
        "y": line.loss.tolist(),
        "line": {"color": tone, "width": 2},
        "name": label,
        "legendgroup": group,
        "hoverinfo": "skip",
        **axes,
    }
    return [ribbon, curve]


def _dots(
    scene: _Scene,
    rows: pd.DataFrame,
    column: str,
    tone: str,
    symbol: str,
    group: str,
    panel: int,
    y: Array | None = None,
) -> Trace:
    text = []
    for run_id, size, tokens, iterations, loss, seed in zip(
        rows["run_id"],
        rows["n_params"],
        rows["tokens"],
        rows["iterations"],
        rows["loss"],
        rows["seed"],
        strict=True,
    ):
        budget = wording.budget(None if np.isnan(iterations) else float(iterations), float(tokens))
        seed_text = "" if np.isnan(seed) else f", seed {seed:.0f}"
        text.append(
            f"<b>run {_plain(str(run_id))}</b><br>{wording.human(size)} parameters, {budget}{seed_text}<br>"
            f"loss {loss:.4f} nats a token"
        )
    return {
        "type": "scatter",
        "mode": "markers",
        "x": rows[column].astype(float).tolist(),
        "y": rows["loss"].astype(float).tolist() if y is None else y.tolist(),
        "marker": {"color": tone, "symbol": symbol, "size": 9, "line": {"color": "white", "width": 1}},
        "hovertext": text,
        "hoverinfo": "text",
        "customdata": [scene.links.get(str(run_id), "") for run_id in rows["run_id"]],
        "legendgroup": group,
        "showlegend": False,
        **_axes(panel),
    }


def _marks(
    x: Sequence[float],
    y: Sequence[float],
    text: Sequence[str],
    symbol: str,
    label: str,
    panel: int,
    size: int = 9,
) -> Trace:
    return {
        "type": "scatter",
        "mode": "markers",
        "x": list(x),
        "y": list(y),
        "marker": {"color": INK, "symbol": symbol, "size": size, "line": {"color": INK, "width": 1.3}},
        "hovertext": list(text),
        "hoverinfo": "text" if symbol != "circle-open" else "skip",
        "name": label,
        "legendgroup": label,
        "showlegend": panel == 0,
        "legendrank": 2000,
        **_axes(panel),
    }


def _layout(
    scene: _Scene,
    x_axis: dict[str, Any],
    x_title: str,
    y_axis: dict[str, Any],
    y_title: str,
    panels: int | None = None,
) -> dict[str, Any]:
    count = len(scene.laws) if panels is None else panels
    line = {
        "gridcolor": "#E4E7EB",
        "linecolor": GREY,
        "ticks": "outside",
        "tickcolor": GREY,
        "automargin": True,
    }
    layout: dict[str, Any] = {
        "template": None,
        "font": {
            "family": "system-ui, -apple-system, Segoe UI, Roboto, sans-serif",
            "size": 13,
            "color": INK,
        },
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "margin": {"l": 70, "r": 20, "t": 40, "b": 60},
        "hovermode": "closest",
        "hoverlabel": {"bgcolor": "white", "font": {"color": INK}},
        "legend": {"orientation": "h", "y": -0.2, "yanchor": "top", "x": 0, "font": {"size": 12}},
        "height": 520,
        "annotations": [],
    }
    gap = 0.05
    width = (1 - gap * (count - 1)) / count
    for panel in range(count):
        suffix = "" if panel == 0 else str(panel + 1)
        domain = [panel * (width + gap), panel * (width + gap) + width]
        layout[f"xaxis{suffix}"] = {**line, **x_axis, "domain": domain, "title": {"text": x_title}}
        axis = {**line, **y_axis, "anchor": f"x{suffix}"}
        if panel:
            layout[f"yaxis{suffix}"] = {**axis, "matches": "y", "showticklabels": False}
        else:
            layout["yaxis"] = {**axis, "title": {"text": y_title}}
        if panels is None:
            layout["annotations"].append(
                {
                    "text": f"<b>{_arm(scene.laws[panel].name)}</b>",
                    "xref": "paper",
                    "yref": "paper",
                    "x": domain[0],
                    "y": 1.02,
                    "xanchor": "left",
                    "yanchor": "bottom",
                    "showarrow": False,
                    "font": {"size": 14},
                }
            )
    return layout


def _x_axis(scene: _Scene, *, by_size: bool) -> tuple[dict[str, Any], str]:
    if by_size:
        sizes = np.concatenate([law.curve.sizes for law in scene.laws])
        low, high = float(sizes.min()) / 1.25, float(sizes.max()) * 1.25
        return _log_axis(low, high, plain_ticks(low, high), wording.human), "parameters"
    budgets = np.unique(np.concatenate([law.budgets for law in scene.laws]))
    unit = scene.laws[0].budget
    low, high = float(budgets[0]) / 1.2, float(budgets[-1]) * 1.2
    few = len(budgets) <= 6 and (len(budgets) < 2 or float((budgets[1:] / budgets[:-1]).min()) > 1.2)
    ticks = [float(value) for value in budgets] if few else plain_ticks(low, high)
    text = (lambda v: f"{v:,.0f}") if unit == "iterations" else wording.human
    return _log_axis(low, high, ticks, text), budget_label(unit)


def _loss_axis(losses: Array) -> dict[str, Any]:
    low, high, ticks, text = linear_ticks(losses)
    return _log_axis(low, high, ticks, text)


def _log_axis(
    low: float, high: float, ticks: Sequence[float], text: Callable[[float], str]
) -> dict[str, Any]:
    return {
        "type": "log",
        "range": [float(np.log10(low)), float(np.log10(high))],
        "tickmode": "array",
        "tickvals": list(ticks),
        "ticktext": [text(tick) for tick in ticks],
        "minor": {"ticks": ""},
    }


def _axes(panel: int) -> dict[str, str]:
    suffix = "" if panel == 0 else str(panel + 1)
    return {"xaxis": f"x{suffix}", "yaxis": f"y{suffix}"}


def _see_through(tone: str, share: float) -> str:
    return "rgba({}, {}, {}, {})".format(*(int(tone[i : i + 2], 16) for i in (1, 3, 5)), share)


def _arm(name: str) -> str:
    return _plain(wording.architecture(name))


def _plain(text: str) -> str:
    """Text that Plotly will not read as markup."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
