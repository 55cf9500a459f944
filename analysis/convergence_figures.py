"""The panels of a convergence figure, drawn as files and interactive: one metric each, the published curves dashed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis import traces, wording
from analysis.convergence import Curve, Panel
from analysis.interactive import InteractiveFigure
from analysis.plots import save_figures
from analysis.style import MARKERS, budget_label, colour, plain_ticks, set_ticks, shades

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_convergence(panels: Sequence[Panel], out: Path) -> list[Path]:
    """Write all panels as one figure, SVG and PNG, into `out`; returns the files."""
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)

    def draw(figure: Figure) -> None:
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, panel in zip(grid, panels, strict=False):
            _draw(axes, panel)
        for spare in grid[len(panels) :]:
            spare.set_visible(False)

    return save_figures([("convergence", (6.4 * columns, 4.6 * rows), draw)], out)


def _draw(axes: Axes, panel: Panel) -> None:
    for curve, tone, marker in _looks(panel):
        axes.plot(*curve.means(), color=tone, lw=2, label=curve.label)
        axes.plot(curve.iterations, curve.values, marker, color=tone, mec="white", mew=0.7, ms=6, zorder=4)
    handles, labels = axes.get_legend_handles_labels()
    side = axes if panel.same_embedding or not panel.published else axes.twinx()
    for curve in panel.published:
        tone = colour(curve.architecture, [])
        dashes = side.plot(
            curve.iterations,
            curve.values,
            ls=(0, (4, 3)),
            marker="o",
            mfc="white",
            ms=4,
            lw=1.2,
            color=tone,
            alpha=0.75,
        )
        handles, labels = [*handles, *dashes], [*labels, curve.label]
    if side is not axes:
        side.grid(visible=False)
        side.spines["right"].set_visible(True)
        side.set_ylabel("published, another embedding (dashed)")
    low, high = _reach(panel)
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    set_ticks(axes, "x", plain_ticks(low, high), wording.human)
    axes.set_xlabel(budget_label("iterations"))
    axes.set_ylabel(panel.metric)
    axes.set_title(panel.title)
    axes.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, fontsize=8.5)


def interactive_convergence(panels: Sequence[Panel]) -> list[InteractiveFigure]:
    """A figure for each panel, since panels side by side would be too narrow for two axes."""
    return [
        InteractiveFigure(panel.name, panel.title, panel.caption, _data(panel), _layout(panel))
        for panel in panels
    ]


def _data(panel: Panel) -> list[traces.Trace]:
    data: list[traces.Trace] = []
    for curve, tone, _ in _looks(panel):
        group, label = curve.label, traces.plain(curve.label)
        counts, means = curve.means()
        line = {"type": "scatter", "legendgroup": group, "name": label}
        data.append(
            {
                **line,
                "mode": "lines",
                "x": counts,
                "y": means,
                "line": {"color": tone, "width": 2},
                "hoverinfo": "skip",
            }
        )
        dots = {"mode": "markers", "x": list(curve.iterations), "y": list(curve.values), "showlegend": False}
        text = [
            f"<b>run {traces.plain(run_id)}</b><br>{label}, {count:,.0f} iterations<br>"
            f"{traces.plain(panel.metric)} {wording.number(value, 4)}"
            for run_id, count, value in zip(curve.run_ids, curve.iterations, curve.values, strict=True)
        ]
        marker = {"color": tone, "size": 9, "line": {"color": "white", "width": 1}}
        data.append({**line, **dots, "marker": marker, "hovertext": text, "hoverinfo": "text"})
    for curve in panel.published:
        tone, label = colour(curve.architecture, []), traces.plain(curve.label)
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": label,
                "x": list(curve.iterations),
                "y": list(curve.values),
                "yaxis": "y" if panel.same_embedding else "y2",
                "opacity": 0.75,
                "line": {"color": tone, "width": 1.5, "dash": "dash"},
                "marker": {"color": "white", "size": 7, "line": {"color": tone, "width": 1.5}},
                "hovertext": [
                    f"<b>{label}</b><br>{count:,.0f} iterations<br>{value:g} ± {panel.reading_error:g}"
                    for count, value in zip(curve.iterations, curve.values, strict=True)
                ],
                "hoverinfo": "text",
            }
        )
    return data


def _layout(panel: Panel) -> dict[str, Any]:
    low, high = _reach(panel)
    x_axis = traces.log_axis(low, high, plain_ticks(low, high), wording.human)
    layout = traces.plain_layout(x_axis, budget_label("iterations"), {}, traces.plain(panel.metric))
    layout["legend"] = {**layout["legend"], "y": -0.28}  # below the axis' title where the page is narrow
    if panel.published and not panel.same_embedding:
        layout["yaxis2"] = {
            **layout["yaxis"],
            "overlaying": "y",
            "tickmode": "auto",
            "side": "right",
            "showgrid": False,
            "title": {"text": "published, another embedding"},
        }
    return layout


def _looks(panel: Panel) -> Iterator[tuple[Curve, str, str]]:
    """Each curve with its colour, lighter the smaller the model, and its marker."""
    names = [curve.architecture for curve in panel.curves]
    for name in dict.fromkeys(names):
        own = [curve for curve in panel.curves if curve.architecture == name]
        tones = shades(colour(name, names), len(own))
        for i, (curve, tone) in enumerate(zip(own, tones, strict=True)):
            yield curve, tone, MARKERS[i % len(MARKERS)]


def _reach(panel: Panel) -> tuple[float, float]:
    counts = [count for curve in (*panel.curves, *panel.published) for count in curve.iterations]
    return min(counts) / 1.2, max(counts) * 1.2
