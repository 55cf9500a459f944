"""Draw figures as the plain JSON that Plotly's script reads.

This module does not use Plotly's Python classes: their import takes longer than the fit of a study.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping
from typing import Any

import numpy as np

from analysis.report.description import Arrow, Axis, Band, Entry, Figure, Marker, Panel, Series
from analysis.report.static import raster
from analysis.report.style import GRID, INK, SHAPES
from analysis.text import shortened

Trace = dict[str, Any]
GREY = "#9AA5B1"
FONT = "system-ui, -apple-system, Segoe UI, Roboto, DejaVu Sans, sans-serif"
LINE = {"gridcolor": GRID, "linecolor": GREY, "ticks": "outside", "tickcolor": GREY, "automargin": True}
PIXELS = 1.5
"""Pixels of the page for one point of a drawn figure."""
WIDE, SMALL = (8.0, 3.6), (2.8, 2.1)
"""Inches of the axes of a panel on its own and of one among several, on a wide page."""
LABEL = 44
"""Most characters of an axis's label."""


def plotly(figure: Figure, links: Mapping[str, str]) -> dict[str, Any]:
    """Return a figure's name and the data and layout of Plotly for each panel.

    `links` maps run ids to addresses that a click opens. The page itself has titles and legends: its entries name
    traces by their legendgroup, and images by their name.
    """
    inches = WIDE if len(figure.panels) == 1 else SMALL
    return {"name": figure.name, "panels": [_panel(panel, links, inches) for panel in figure.panels]}


def _panel(panel: Panel, links: Mapping[str, str], inches: tuple[float, float]) -> dict[str, Any]:
    data = [_band(band) for band in panel.bands]
    data += [_series(one, links) for one in panel.series if not one.cloud]
    data += [_arrow(arrow) for arrow in panel.arrows]
    layout: dict[str, Any] = {
        "template": None,
        "font": {"family": FONT, "size": 13, "color": INK},
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "margin": {"l": 50, "r": 28, "t": 30, "b": 44},
        "hovermode": "closest",
        "hoverlabel": {"bgcolor": "white", "font": {"color": INK}},
        "showlegend": False,
        "xaxis": _axis(panel.x),
        "yaxis": _axis(panel.y),
    }
    if panel.right is not None:
        layout["yaxis2"] = _axis(panel.right, overlaying="y", side="right", showgrid=False, tickmode="auto")
    groups = dict.fromkeys(one.group for one in panel.series if one.cloud)
    if groups:
        layout["images"] = [_image(panel, group, inches, i) for i, group in enumerate(groups)]
    return {"data": data, "layout": layout}


def swatch(entry: Entry) -> str:
    """Return the line and the mark of a legend's entry as a small SVG."""
    parts = []
    if entry.line is not None:
        dash = {"dash": ' stroke-dasharray="5 3"', "dot": ' stroke-dasharray="2 2"'}.get(entry.line.dash, "")
        width = min(3.0, entry.line.width * PIXELS)
        parts.append(f'<path d="M0 8H28" stroke="{entry.line.colour}" stroke-width="{width:g}"{dash}/>')
    if entry.mark is not None:
        one = entry.mark
        parts.append(
            f'<g transform="translate(14 8)">{mark(one.marker, one.colour, one.fill, 0.75 * one.size)}</g>'
        )
    width = 28 if entry.line is not None else 16
    left = 0 if entry.line is not None else 6
    return f'<svg viewBox="{left} 0 {width} 16" width="{width}" height="16" aria-hidden="true">{"".join(parts)}</svg>'


def mark(marker: Marker, colour: str, fill: str, radius: float) -> str:
    """Return a marker around the origin as an element of SVG."""
    if marker == "thin-x":
        way = f"M{-radius:g} {-radius:g}L{radius:g} {radius:g}M{-radius:g} {radius:g}L{radius:g} {-radius:g}"
        return f'<path d="{way}" stroke="{colour}" stroke-width="1.5"/>'
    looks = f'fill="{fill}" stroke="{colour}" stroke-width="1.2"'
    if marker == "circle":
        return f'<circle r="{radius:g}" {looks}/>'
    corners = " ".join(f"{radius * x:.2f},{-radius * y:.2f}" for x, y in SHAPES[marker])
    return f'<polygon points="{corners}" {looks}/>'


def _image(panel: Panel, group: str, inches: tuple[float, float], number: int) -> dict[str, Any]:
    """Draw the points of a group that have no texts as an image under the others, which is stretched with the axes."""
    assert panel.x.limits is not None
    assert panel.y.limits is not None
    clouds = [one for one in panel.series if one.cloud and one.group == group]
    data = b64encode(raster(clouds, panel.x, panel.y, inches)).decode()
    left, right = _range(panel.x, panel.x.limits)
    bottom, top = _range(panel.y, panel.y.limits)
    return {
        "source": f"data:image/png;base64,{data}",
        "name": group,
        "xref": "x",
        "yref": "y",
        "x": left
        + 1e-9 * number * (right - left),  # of several images at one place Plotly draws the first alone
        "y": top,
        "sizex": right - left,
        "sizey": top - bottom,
        "sizing": "stretch",
        "layer": "below",
    }


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


def _series(one: Series, links: Mapping[str, str]) -> Trace:
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
        trace["name"] = plain(one.legend)
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
        return marker | {"line": {"color": "white", "width": 1 if one.marker == "circle" else 0.4}}
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
        "hovertext": [_hover(text) for text in arrow.hover],
        "hoverinfo": "text",
    }


def _hover(text: str) -> str:
    """Join the lines of a text as markup, the first of several in bold."""
    first, *more = plain(text).split("\n")
    return "<br>".join([f"<b>{first}</b>", *more]) if more else first


def _axis(axis: Axis, **place: object) -> dict[str, Any]:
    found: dict[str, Any] = {
        **LINE,
        **place,
        "title": {"text": plain(shortened([axis.label], LABEL)[axis.label])},
    }
    if axis.log:
        found["type"] = "log"
    if axis.limits:
        found["range"] = _range(axis, axis.limits)
    if axis.ticks:
        found["tickmode"] = "array"
        found["tickvals"] = [at for at, _ in axis.ticks]
        found["ticktext"] = [plain(text) for _, text in axis.ticks]
        found["minor"] = {"ticks": ""}
    else:
        found["nticks"] = 8
    return found


def _range(axis: Axis, limits: tuple[float, float]) -> list[float]:
    """Return the limits of an axis in Plotly's units."""
    return [float(np.log10(end)) for end in limits] if axis.log else list(limits)
