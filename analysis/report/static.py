"""Draw figures as files: SVG for papers, PNG for web pages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from analysis.report.description import Arrow, Axis, Figure, Marker, Panel, Series
from analysis.report.style import GREY, GRID, INK

if TYPE_CHECKING:
    import matplotlib.figure
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

RC: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": "#52606D",
    "ytick.color": "#52606D",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "text.parse_math": False,
    "svg.hashsalt": "ssmscale",
    "svg.fonttype": "path",
}
MARKERS = dict(zip(get_args(Marker), ["o", "s", "^", "D", "v", "P", "X", "*", "x", ""], strict=True))
DASHES: dict[str, Any] = {"none": "none", "solid": "-", "dash": (0, (4, 3))}


def save_figures(figures: Sequence[Figure], out: Path) -> None:
    """Write each figure as SVG and PNG into `out`."""
    import matplotlib as mpl

    out.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(RC):  # type: ignore[arg-type]
        for figure in figures:
            drawn = draw(figure)
            drawn.savefig(out / f"{figure.name}.svg", facecolor="white", metadata={"Date": None})
            drawn.savefig(out / f"{figure.name}.png", facecolor="white", dpi=160)


def draw(figure: Figure) -> matplotlib.figure.Figure:
    """Draw a figure with matplotlib and its current settings."""
    import matplotlib.figure

    rows, columns = figure.grid
    width, height = figure.inches
    drawn = matplotlib.figure.Figure(figsize=(width * columns, height * rows), layout="constrained")
    grid = drawn.subplots(rows, columns, sharey=figure.shared_y, squeeze=False).ravel()
    shared = figure.shared_groups
    for i, (axes, panel) in enumerate(zip(grid, figure.panels, strict=False)):
        _draw(axes, panel)
        if i % columns and figure.shared_y:
            axes.set_ylabel("")
        entries = _entries([one for one in (*panel.series, *panel.keys) if one.group not in shared])
        crowded = panel.right is not None or any(one.ends for one in panel.series)
        if len(figure.panels) == 1 and not crowded:
            axes.legend(handles=entries, loc="best")
        elif entries:
            axes.legend(
                handles=entries,
                loc="upper center",
                bbox_to_anchor=(0.5, -0.14),
                ncols=2,
                fontsize=8.5,
                columnspacing=1.2,
            )
    for spare in grid[len(figure.panels) :]:
        spare.set_visible(False)
    common = _entries([one for panel in figure.panels for one in panel.series if one.group in shared])
    if common:
        fitting = int(width * columns / 2)
        drawn.legend(handles=common, loc="outside lower center", ncols=fitting, fontsize=8.5)
    return drawn


def _draw(axes: Axes, panel: Panel) -> None:
    right = None
    if panel.right is not None:
        right = axes.twinx()
        right.grid(visible=False)
        right.spines["right"].set_visible(True)
        _set_axis(right, "y", panel.right)
    for band in panel.bands:
        axes.fill_between(band.x, band.low, band.high, color=band.colour, alpha=0.14, lw=0, zorder=1)
    for one in panel.series:
        _draw_series(right if right is not None and one.right else axes, one)
    for level, arrow in enumerate(panel.arrows):
        _draw_arrow(axes, arrow, level)
    _set_axis(axes, "x", panel.x)
    _set_axis(axes, "y", panel.y)
    axes.set_title(panel.title)


def _draw_series(axes: Axes, one: Series) -> None:
    strength = 2 if one.summed else 2.5
    for x, ends in zip(one.x, one.ends, strict=False):  # lines, which the legend avoids
        axes.plot([x, x], ends, color=one.colour, lw=2, alpha=0.55, solid_capstyle="butt", zorder=strength)
    if one.dash != "none":
        axes.plot(one.x, one.y, color=one.colour, lw=one.width, ls=DASHES[one.dash], zorder=strength)
    if one.marker == "thin-x":
        axes.scatter(one.x, one.y, s=one.size**2, marker="x", color=one.colour, lw=1.2, zorder=5)
    elif one.marker != "none":
        axes.scatter(
            one.x,
            one.y,
            s=one.size**2,
            marker=MARKERS[one.marker],
            c=list(one.fills) or one.colour,
            ec=one.colour if one.fills else "white",
            lw=1.1 if one.fills else 0.7,
            zorder=strength + 2,
            clip_on=False,
        )


def _draw_arrow(axes: Axes, arrow: Arrow, level: int) -> None:
    """Draw an arrow with its text above; `level` raises the text, as several arrows may have the same height."""
    from matplotlib.patheffects import withStroke

    tail, head = arrow.x
    axes.annotate(
        "",
        xy=(head, arrow.y),
        xytext=(tail, arrow.y),
        arrowprops={"arrowstyle": "->", "color": INK, "lw": 1.2, "shrinkA": 4, "shrinkB": 0},
        zorder=6,
    )
    axes.annotate(
        arrow.text,
        xy=(float(np.sqrt(tail * head)), arrow.y),
        xytext=(0, 2 + 12 * level),
        textcoords="offset points",
        color=arrow.colour,
        ha="center",
        va="bottom",
        fontsize=9.5,
        fontweight="bold",
        path_effects=[withStroke(linewidth=3, foreground="white")],
        zorder=7,
    )


def _set_axis(axes: Axes, which: str, axis: Axis) -> None:
    """Set scale, limits, label and ticks of an axis, x or y; given ticks replace all others."""
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    along = axes.xaxis if which == "x" else axes.yaxis
    if axis.log:
        axes.set(**{f"{which}scale": "log"})
    if axis.limits:
        axes.set(**{f"{which}lim": axis.limits})
    along.set_label_text(axis.label)
    if axis.ticks:
        along.set_major_locator(FixedLocator([at for at, _ in axis.ticks]))
        along.set_major_formatter(FixedFormatter([text for _, text in axis.ticks]))
        along.set_minor_locator(NullLocator())


def _entries(series: Sequence[Series]) -> list[Artist]:
    """Return a legend entry for each group with a text, in the style of its line and its marker."""
    from matplotlib.lines import Line2D

    groups: dict[str, list[Series]] = {}
    for one in series:
        groups.setdefault(one.group, []).append(one)
    entries: list[Artist] = []
    for members in groups.values():
        named = next((one for one in members if one.legend and not one.summed), None)
        if named is None:
            continue
        line = next((one for one in members if one.dash != "none"), named)
        dots = next((one for one in members if one.marker != "none"), named)
        hollow = bool(dots.fills) and dots.fills[0] in ("white", "none")
        entries.append(
            Line2D(
                [],
                [],
                color=named.colour,
                ls=DASHES["solid" if named.ends else line.dash],
                lw=line.width,
                marker=MARKERS[dots.marker],
                ms=dots.size,
                mfc=dots.fills[0] if hollow else named.colour,
                label=named.legend,
            )
        )
    return entries
