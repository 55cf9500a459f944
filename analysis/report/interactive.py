"""Pieces of an interactive figure: curves with ribbons, points that name their run, axes in real units."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis import text as wording
from analysis.laws.law import Array
from analysis.report.style import INK, Line, Spread, budget_label, linear_ticks, plain_ticks

if TYPE_CHECKING:
    import pandas as pd

    from analysis.findings.results import FitDocument

Trace = dict[str, Any]
GREY = "#9AA5B1"
LINE = {"gridcolor": "#E4E7EB", "linecolor": GREY, "ticks": "outside", "tickcolor": GREY, "automargin": True}


@dataclass(frozen=True)
class Scene:
    """What every figure draws from: the laws with their points, the document, and addresses of runs."""

    laws: Sequence[Spread]
    document: FitDocument
    links: Mapping[str, str]

    @property
    def names(self) -> list[str]:
        """Architectures, the reference first."""
        return [law.name for law in self.laws]


def curve(line: Line, label: str, tone: str, group: str, panel: int) -> list[Trace]:
    """A fitted line and, before it, its ribbon."""
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


def dots(
    scene: Scene,
    rows: pd.DataFrame,
    column: str,
    tone: str,
    symbol: str,
    group: str,
    panel: int,
    y: Array | None = None,
) -> Trace:
    """Points in one colour; under the pointer each says its run, on a click it opens its address."""
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
            f"<b>run {plain(str(run_id))}</b><br>{wording.human(size)} parameters, {budget}{seed_text}<br>"
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


def marks(
    x: Sequence[float],
    y: Sequence[float],
    text: Sequence[str],
    symbol: str,
    label: str,
    panel: int,
    size: int = 9,
) -> Trace:
    """What was left out of a fit, or predicted without it, in ink."""
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


def layout(
    scene: Scene,
    x_axis: dict[str, Any],
    x_title: str,
    y_axis: dict[str, Any],
    y_title: str,
    panels: int | None = None,
) -> dict[str, Any]:
    """Axes side by side, one pair an architecture (or `panels` of them), sharing the vertical one."""
    count = len(scene.laws) if panels is None else panels
    layout = _page()
    gap = 0.05
    width = (1 - gap * (count - 1)) / count
    for panel in range(count):
        suffix = "" if panel == 0 else str(panel + 1)
        domain = [panel * (width + gap), panel * (width + gap) + width]
        layout[f"xaxis{suffix}"] = {**LINE, **x_axis, "domain": domain, "title": {"text": x_title}}
        axis = {**LINE, **y_axis, "anchor": f"x{suffix}"}
        if panel:
            layout[f"yaxis{suffix}"] = {**axis, "matches": "y", "showticklabels": False}
        else:
            layout["yaxis"] = {**axis, "title": {"text": y_title}}
        if panels is None:
            layout["annotations"].append(
                {
                    "text": f"<b>{arm(scene.laws[panel].name)}</b>",
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


def plain_layout(
    x_axis: dict[str, Any], x_title: str, y_axis: dict[str, Any], y_title: str
) -> dict[str, Any]:
    """One pair of axes that belongs to no law."""
    return _page() | {
        "xaxis": {**LINE, **x_axis, "title": {"text": x_title}},
        "yaxis": {**LINE, **y_axis, "title": {"text": y_title}},
    }


def _page() -> dict[str, Any]:
    """What every figure of a page has in common."""
    return {
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


def x_axis(scene: Scene, *, by_size: bool) -> tuple[dict[str, Any], str]:
    """The horizontal axis over sizes or budgets, and its title."""
    if by_size:
        sizes = np.concatenate([law.curve.sizes for law in scene.laws])
        low, high = float(sizes.min()) / 1.25, float(sizes.max()) * 1.25
        return log_axis(low, high, plain_ticks(low, high), wording.human), "parameters"
    budgets = np.unique(np.concatenate([law.budgets for law in scene.laws]))
    unit = scene.laws[0].budget
    low, high = float(budgets[0]) / 1.2, float(budgets[-1]) * 1.2
    few = len(budgets) <= 6 and (len(budgets) < 2 or float((budgets[1:] / budgets[:-1]).min()) > 1.2)
    ticks = [float(value) for value in budgets] if few else plain_ticks(low, high)
    text = (lambda v: f"{v:,.0f}") if unit == "iterations" else wording.human
    return log_axis(low, high, ticks, text), budget_label(unit)


def loss_axis(losses: Array) -> dict[str, Any]:
    """The vertical axis of a loss: logarithmic, with ticks in nats."""
    low, high, ticks, text = linear_ticks(losses)
    return log_axis(low, high, ticks, text)


def log_axis(low: float, high: float, ticks: Sequence[float], text: Callable[[float], str]) -> dict[str, Any]:
    """A logarithmic axis with the ticks given, as text in real units."""
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


def arm(name: str) -> str:
    """An architecture's written name, safe in Plotly's texts."""
    return plain(wording.architecture(name))


def plain(text: str) -> str:
    """Text that Plotly will not read as markup."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
