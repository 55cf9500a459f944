"""Quality of what models generate against training iterations, beside the published curves where there are any.

Values compare where metric and settings are equal and nowhere else, so each pair of them is a panel of its own. The
published figure (arXiv 2601.14786) belongs to three families of metrics: Frechet distance, KL divergence and CLAP
score. It does not say which models embedded its audio. Its curves therefore have an axis of their own, at the right,
and only shapes compare: how soon an architecture levels off, and which of two is ahead. A proxy has no published curve.

The panels of a convergence figure, drawn as files and interactive: one metric each, the published curves dashed.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis import text as wording
from analysis.errors import InputError
from analysis.report import interactive as traces
from analysis.report.figures import InteractiveFigure
from analysis.report.static import save_figures
from analysis.report.style import MARKERS, budget_label, colour, plain_ticks, set_ticks, shades

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = (
    "run_id",
    "architecture",
    "n_params",
    "iterations",
    "seed",
    "metric",
    "value",
    "n_prompts",
    "settings",
)
"""What a table of evaluations has."""
NUMBERS = ("n_params", "iterations", "value")


@dataclass(frozen=True)
class Family:
    """Metrics that measure the same with whatever model embeds the audio."""

    key: str
    """The column of the published values."""
    title: str
    reading_error: float
    """How exactly the published figure could be read."""


FAMILIES = (
    Family("fd", "Fréchet distance (lower is better)", 0.5),
    Family("kl", "KL divergence (lower is better)", 0.02),
    Family("clap", "CLAP score (higher is better)", 0.001),
)
OTHERS = {
    "fd_mel_proxy": "Fréchet distance of mel spectra, a proxy (lower is better)",
    "ce": "Held-out cross-entropy, nats a token (lower is better)",
    "ppl": "Held-out perplexity (lower is better)",
}


@dataclass(frozen=True)
class Curve:
    """Values of one model over iterations; equal iterations are its seeds."""

    architecture: str
    n_params: float | None
    """None for a published curve."""
    iterations: tuple[float, ...]
    values: tuple[float, ...]
    run_ids: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """Its entry in a legend."""
        name = wording.architecture(self.architecture)
        return f"{name}, published" if self.n_params is None else f"{name} {wording.human(self.n_params)}"

    def means(self) -> tuple[list[float], list[float]]:
        """Iterations in rising order and the mean over seeds at each."""
        counts = sorted(set(self.iterations))
        pairs = list(zip(self.iterations, self.values, strict=True))
        return counts, [float(np.mean([value for at, value in pairs if at == count])) for count in counts]


@dataclass(frozen=True)
class Panel:
    """One metric under one set of settings."""

    metric: str
    settings: str
    n_prompts: str
    title: str
    curves: tuple[Curve, ...]
    published: tuple[Curve, ...]
    reading_error: float | None
    same_embedding: bool
    """Whether the published curves were measured as these were, and so share their axis."""

    @property
    def name(self) -> str:
        """What its element on a page is called."""
        return "convergence_" + re.sub(r"\W", "_", f"{self.metric}_{self.settings}")

    @property
    def caption(self) -> str:
        """What is seen, and what may not be compared."""
        text = (
            f"{self.metric}, settings {self.settings}, over {self.n_prompts}. Dots: seeds; lines: their mean."
        )
        if not self.published:
            return text
        text += f" Dashed: the published curves, read from a figure to ±{self.reading_error:g}, "
        if self.same_embedding:
            return text + "measured with the same embedding model."
        return (
            text
            + "on the axis at the right: they were measured on other prompts (MusicCaps) and with another embedding "
            "model, which the figure does not name, so that shapes compare and heights do not."
        )


def convergence_panels(evaluations: pd.DataFrame, published_metrics: Collection[str] = ()) -> list[Panel]:
    """The panels of a table with COLUMNS: families with published curves first, then proxies and held-out loss.

    `published_metrics` names metrics known to be measured with the models that the published figure used. Values of
    single codebooks are left to the table. Raises InputError where the table lacks a column or a number is none.
    """
    _check(evaluations)
    found = []
    for (metric, settings), rows in evaluations.groupby(["metric", "settings"], sort=False):
        family, title = family_of(str(metric)), _title(str(metric))
        if title is None:
            continue
        published = tuple(_published(family.key)) if family else ()
        found.append(
            Panel(
                metric=str(metric),
                settings=str(settings),
                n_prompts=_counted(rows),
                title=title,
                curves=tuple(_curves(rows)),
                published=published,
                reading_error=family.reading_error if family else None,
                same_embedding=str(metric) in published_metrics,
            )
        )
    order = [family.title for family in FAMILIES] + list(OTHERS.values())
    return sorted(found, key=lambda panel: (order.index(panel.title), panel.metric))


def family_of(metric: str) -> Family | None:
    """The family a metric belongs to; None for a proxy and for a loss."""
    base = metric.partition("-")[0]
    if base.endswith("_proxy"):
        return None
    return next(
        (family for family in FAMILIES if base == family.key or base.startswith(f"{family.key}_")), None
    )


def _title(metric: str) -> str | None:
    family = family_of(metric)
    return family.title if family else OTHERS.get(metric.partition("-")[0])


def _check(evaluations: pd.DataFrame) -> None:
    missing = [name for name in COLUMNS if name not in evaluations.columns]
    if missing:
        raise InputError(
            f"evaluations: column {missing[0]} is missing; the table has {', '.join(map(str, evaluations.columns))}."
        )
    for name in NUMBERS:
        for run_id, value in zip(evaluations["run_id"], evaluations[name], strict=True):
            if (
                not isinstance(value, int | float | np.number)
                or not np.isfinite(value)
                or (name != "value" and value <= 0)
            ):
                raise InputError(
                    f"evaluations: run {run_id}: {name}: {value!r}: is no number that can be drawn."
                )


def _counted(rows: pd.DataFrame) -> str:
    counts = sorted({int(count) for count in rows["n_prompts"]})
    return f"{' or '.join(f'{count:,}' for count in counts)} prompts or clips"


def _curves(rows: pd.DataFrame) -> Iterator[Curve]:
    for (architecture, n_params), found in rows.groupby(["architecture", "n_params"]):
        own = found.sort_values(["iterations", "seed"], kind="stable")
        yield Curve(
            architecture=str(architecture),
            n_params=float(str(n_params)),
            iterations=tuple(own["iterations"].astype(float)),
            values=tuple(own["value"].astype(float)),
            run_ids=tuple(own["run_id"].astype(str)),
        )


def _published(column: str) -> Iterator[Curve]:
    rows = published_table()
    for architecture in dict.fromkeys(str(row["architecture"]) for row in rows):
        own = [row for row in rows if row["architecture"] == architecture]
        counts, values = (tuple(float(row[key]) for row in own) for key in ("iterations", column))
        yield Curve(architecture, None, counts, values)


@cache
def published_table() -> tuple[dict[str, str], ...]:
    """The published figure's values, a row for each architecture and iteration count."""
    text = (files("analysis.report") / "paper_convergence.csv").read_text(encoding="utf-8")
    return tuple(csv.DictReader(line for line in text.splitlines() if not line.startswith("#")))


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
