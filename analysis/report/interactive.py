"""Draw figures as the plain JSON that Plotly's script reads.

This module does not use Plotly's Python classes: their import takes longer than the fit of a study.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from analysis.report.description import Arrow, Axis, Band, Figure, Series
from analysis.report.style import GRID, INK

Trace = dict[str, Any]
GREY = "#9AA5B1"
LINE = {"gridcolor": GRID, "linecolor": GREY, "ticks": "outside", "tickcolor": GREY, "automargin": True}
HEADING = {"xref": "paper", "yref": "paper", "showarrow": False, "font": {"size": 14}}
GAP = 0.05
"""Space between two panels, as a share of the page's width."""
PIXELS = 1.5
"""Pixels of the page for one point of a drawn figure."""


def plotly(figure: Figure, links: Mapping[str, str]) -> dict[str, Any]:
    """Return a figure's name with Plotly's data and layout; `links` maps run ids to addresses that a click opens."""
    data: list[Trace] = []
    shared, listed = figure.shared_groups, set[str]()
    for number, panel in enumerate(figure.panels):
        prefix = f"{panel.title}, " if len(figure.panels) > 1 else ""
        traces = [_band(band) for band in panel.bands]
        traces += [_series(one, "" if one.group in shared else prefix, links) for one in panel.series]
        traces += [_arrow(arrow) for arrow in panel.arrows]
        suffix = _suffix(number)
        for trace in traces:
            trace |= {"xaxis": f"x{suffix}", "yaxis": trace.get("yaxis", f"y{suffix}")}
            group = trace["legendgroup"]
            trace["showlegend"] = "name" in trace and group not in listed
            if trace["showlegend"]:
                listed.add(group)
            if group in shared:
                trace["legendrank"] = 2000  # after the entries of single panels
        data += traces
    return {"name": figure.name, "data": data, "layout": _layout(figure)}


def plain(text: str) -> str:
    """Escape a text for Plotly, which reads markup."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _band(band: Band) -> Trace:
    red, green, blue = (int(band.colour[i : i + 2], 16) for i in (1, 3, 5))
    return {
        "type": "scatter",
        "mode": "lines",
        "x": [*band.x, *reversed(band.x)],
        "y": [*band.high, *reversed(band.low)],
        "fill": "toself",
        "fillcolor": f"rgba({red}, {green}, {blue}, 0.14)",
        "line": {"width": 0},
        "hoverinfo": "skip",
        "legendgroup": band.group,
    }


def _series(one: Series, prefix: str, links: Mapping[str, str]) -> Trace:
    parts = [part for part, kept in (("lines", one.dash), ("markers", one.marker)) if kept != "none"]
    trace: Trace = {
        "type": "scatter",
        "mode": "+".join(parts),
        "x": list(one.x),
        "y": list(one.y),
        "legendgroup": one.group,
        "hoverinfo": "text" if one.hover else "skip",
    }
    if one.legend:
        trace["name"] = plain(prefix + one.legend)
    if one.dash != "none":
        trace["line"] = {"color": one.colour, "width": one.width, "dash": one.dash}
    if one.marker != "none":
        trace["marker"] = _marker(one)
    if one.ends:
        trace["error_y"] = {
            "type": "data",
            "symmetric": False,
            "array": [max(0.0, high - y) for (_, high), y in zip(one.ends, one.y, strict=True)],
            "arrayminus": [max(0.0, y - low) for (low, _), y in zip(one.ends, one.y, strict=True)],
            "color": one.colour,
            "thickness": 2,
            "width": 6,
        }
    if one.hover:
        trace["hovertext"] = [_hover(text) for text in one.hover]
    if one.run_ids:
        trace["customdata"] = [links.get(run_id, "") for run_id in one.run_ids]
    if one.right:
        trace["yaxis"] = "y2"
    return trace


def _marker(one: Series) -> dict[str, Any]:
    marker = {"color": one.colour, "symbol": one.marker, "size": PIXELS * one.size}
    if one.marker == "thin-x":
        return marker | {"symbol": "x-thin-open", "line": {"color": one.colour, "width": 1.5}}
    if not one.fills:
        return marker | {"line": {"color": "white", "width": 1}}
    fills = ["rgba(0, 0, 0, 0)" if fill == "none" else fill for fill in one.fills]
    return marker | {
        "color": fills if len(fills) > 1 else fills[0],
        "line": {"color": one.colour, "width": 1.5},
    }


def _arrow(arrow: Arrow) -> Trace:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "x": list(arrow.x),
        "y": [arrow.y, arrow.y],
        "line": {"color": INK, "width": 1.3, "dash": "dot"},
        "marker": {"symbol": "line-ns-open", "size": 12, "color": INK},
        "name": plain(arrow.legend),
        "legendgroup": arrow.legend,
        "hovertext": list(arrow.hover),
        "hoverinfo": "text",
    }


def _hover(text: str) -> str:
    """Join the lines of a text as markup, the first of several in bold."""
    first, *more = plain(text).split("\n")
    return "<br>".join([f"<b>{first}</b>", *more]) if more else first


def _layout(figure: Figure) -> dict[str, Any]:
    """Arrange the axes in a grid, each panel with its title above it if there are several."""
    rows, columns = figure.grid
    width, height = (1 - GAP * (columns - 1)) / columns, (1 - 0.18 * (rows - 1)) / rows
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
        # Below the title of the axis, even on a narrow page.
        "legend": {"orientation": "h", "y": -0.24 / rows, "yanchor": "top", "x": 0, "font": {"size": 12}},
        "height": 520 if rows == 1 else 160 + 320 * rows,
        "annotations": [],
    }
    for number, panel in enumerate(figure.panels):
        row, column = divmod(number, columns)
        left, bottom = column * (width + GAP), 1 - height - row * (height + 0.18)
        suffix = _suffix(number)
        layout[f"xaxis{suffix}"] = _axis(panel.x, domain=[left, left + width], anchor=f"y{suffix}")
        vertical = _axis(panel.y, domain=[bottom, bottom + height], anchor=f"x{suffix}")
        if figure.shared_y and number:
            vertical |= {"matches": "y"}
        if figure.shared_y and column:
            vertical |= {"showticklabels": False, "title": {}}
        layout[f"yaxis{suffix}"] = vertical
        if panel.right is not None:
            layout["yaxis2"] = _axis(
                panel.right, overlaying="y", side="right", showgrid=False, tickmode="auto"
            )
        if panel.title and len(figure.panels) > 1:
            place = {"x": left, "y": bottom + height + 0.02, "xanchor": "left", "yanchor": "bottom"}
            layout["annotations"].append({"text": f"<b>{plain(panel.title)}</b>", **HEADING, **place})
    return layout


def _axis(axis: Axis, **place: object) -> dict[str, Any]:
    found: dict[str, Any] = {**LINE, **place, "title": {"text": plain(axis.label)}}
    if axis.log:
        found["type"] = "log"
    if axis.limits:
        found["range"] = np.log10(axis.limits).tolist() if axis.log else list(axis.limits)
    if axis.ticks:
        found["tickmode"] = "array"
        found["tickvals"] = [at for at, _ in axis.ticks]
        found["ticktext"] = [plain(text) for _, text in axis.ticks]
        found["minor"] = {"ticks": ""}
    else:
        found["nticks"] = 8
    return found


def _suffix(number: int) -> str:
    return "" if number == 0 else str(number + 1)
