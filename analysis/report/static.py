"""Draw figures as files: SVG for papers, PNG for web pages."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.report.description import Arrow, Axis, Entry, Figure, Marker, Panel, Series
from analysis.report.style import GREY, GRID, INK, SHAPES, apart

if TYPE_CHECKING:
    import matplotlib.figure
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.backend_bases import RendererBase

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
MARKERS: dict[Marker, Any] = {
    "circle": "o",
    "thin-x": "x",
    "none": "",
    **{marker: (*corners, corners[0]) for marker, corners in SHAPES.items()},
}
DASHES: dict[str, Any] = {"none": "none", "solid": "-", "dash": (0, (4, 3)), "dot": ":"}
DPI = 160
SIZE = 10.0
"""Size of the text of ticks in points."""
LINE = 0.21
"""Height of a legend's line in inches."""
CHARACTERS = 9.5
"""Characters of a title in an inch."""


def save_figures(figures: Sequence[Figure], out: Path) -> None:
    """Write each figure as SVG and PNG into `out`."""
    import matplotlib as mpl

    out.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(RC):  # type: ignore[arg-type]
        for figure in figures:
            drawn = draw(figure)
            drawn.savefig(out / f"{figure.name}.png", facecolor="white", dpi=DPI)
            drawn.set_layout_engine("none")  # arranged once for both files
            drawn.savefig(out / f"{figure.name}.svg", facecolor="white", metadata={"Date": None})


def draw(figure: Figure) -> matplotlib.figure.Figure:
    """Draw a figure with matplotlib and its current settings, its legend below all panels."""
    import matplotlib.figure
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    rows, columns = figure.grid
    width, height = figure.inches
    drawn = matplotlib.figure.Figure(figsize=(width * columns, height * rows), layout="constrained", dpi=DPI)
    renderer = FigureCanvasAgg(drawn).get_renderer()  # type: ignore[no-untyped-call]
    grid = drawn.subplots(rows, columns, squeeze=False).ravel()
    more = np.zeros(rows)
    for i, (axes, panel) in enumerate(zip(grid, figure.panels, strict=False)):
        _draw(axes, panel, width)
        entries = figure.legend_of(panel)
        if entries:
            lines = _legend(
                renderer, axes, entries, width * 0.8, loc="upper left", bbox_to_anchor=(0, -0.5 / height)
            )
            more[i // columns] = max(more[i // columns], lines)
    for spare in grid[len(figure.panels) :]:
        spare.set_visible(False)
    if figure.legend:
        lines = _legend(renderer, drawn, figure.legend, width * columns * 0.96, loc="outside lower left")
        more = np.append(more, lines)
    drawn.set_figheight(height * rows + LINE * float(more.sum()))
    return drawn


def raster(series: Sequence[Series], x: Axis, y: Axis, inches: tuple[float, float]) -> bytes:
    """Draw points without axes as a transparent PNG that fills the area of a panel."""
    import matplotlib as mpl
    import matplotlib.figure

    with mpl.rc_context(RC):  # type: ignore[arg-type]
        drawn = matplotlib.figure.Figure(figsize=inches)
        axes = drawn.add_axes((0, 0, 1, 1))
        for one in series:
            _draw_series(axes, one)
        _set_axis(axes, "x", x)
        _set_axis(axes, "y", y)
        axes.set_axis_off()
        found = BytesIO()
        drawn.savefig(found, format="png", dpi=DPI, transparent=True)
    return found.getvalue()


def _legend(renderer: RendererBase, place: Any, entries: Sequence[Entry], inches: float, **where: Any) -> int:
    """Draw a legend in as many columns as fit into a width; return its number of lines."""
    columns = min(len(entries), 6)
    while True:
        handles = [_handle(entry) for entry in entries]
        found = place.legend(handles=handles, ncols=columns, columnspacing=1.4, **where)
        if columns == 1 or found.get_window_extent(renderer).width <= inches * DPI:
            return -(-len(entries) // columns)
        found.remove()
        columns -= 1


def _draw(axes: Axes, panel: Panel, inches: float) -> None:
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
    title = "\n".join(
        fill(panel.title, max(20, int(CHARACTERS * inches)), break_on_hyphens=False).split("\n")[:3]
    )
    axes.set_title(title)


def _draw_series(axes: Axes, one: Series) -> None:
    strength = 2
    for at, ends in zip(one.x, one.ends, strict=False):
        axes.plot([at, at], ends, color=one.colour, lw=2, alpha=0.55, solid_capstyle="butt", zorder=strength)
    x, y = np.asarray(one.x), np.asarray(one.y)  # of many points, which matplotlib would convert one by one
    if one.dash != "none":
        axes.plot(x, y, color=one.colour, lw=one.width, ls=DASHES[one.dash], zorder=strength)
    if one.marker == "thin-x":
        axes.scatter(x, y, s=one.size**2, marker="x", color=one.colour, lw=1.2, zorder=5)
    elif one.marker != "none":
        axes.scatter(
            x,
            y,
            s=one.size**2,
            marker=MARKERS[one.marker],
            c=list(one.fills) or one.colour,
            ec=one.colour if one.fills else "white",
            lw=1.1 if one.fills else 0.7 if one.marker == "circle" else 0.3,
            zorder=strength + 2,
            clip_on=one.cloud,
            rasterized=one.cloud,
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
    if not arrow.text:
        return
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
        box = axes.get_position()
        length = (
            72
            / DPI
            * (box.width * axes.figure.bbox.width if which == "x" else box.height * axes.figure.bbox.height)
        )
        ticks = apart(axis, length, SIZE if which == "x" else 0)
        along.set_major_locator(FixedLocator([at for at, _ in ticks]))
        along.set_major_formatter(FixedFormatter([text for _, text in ticks]))
        along.set_minor_locator(NullLocator())


def _handle(entry: Entry) -> Artist:
    """Return what a legend draws for an entry: a line, a mark, or both."""
    from matplotlib.lines import Line2D

    line, mark = entry.line, entry.mark
    looks: dict[str, Any] = {"ls": "none", "label": entry.text}
    if line is not None:
        looks |= {
            "color": line.colour,
            "ls": DASHES["solid" if line.dash == "none" else line.dash],
            "lw": line.width,
        }
    if mark is not None:
        looks |= {
            "marker": MARKERS[mark.marker],
            "ms": mark.size,
            "mec": mark.colour,
            "mfc": mark.fill,
        }
    return Line2D([], [], **looks)
