"""The figures as files: SVG for papers, PNG for pages; log axes in real units, colours safe for the colour-blind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from analysis import text as wording
from analysis.laws.catalogue import law_named
from analysis.laws.law import Array
from analysis.report.figures import draw_optima, draw_profiles, flat_parameters, has_optima
from analysis.report.figures import size as profile_size
from analysis.report.headlines import main_row, ratio_rows
from analysis.report.style import (
    INK,
    LOSS,
    MARKERS,
    PARAMETERS,
    RC,
    Spread,
    bar,
    budget_label,
    colour,
    linear_ticks,
    plain_ticks,
    set_ticks,
    shade,
    shades,
    spreads,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from analysis.findings.results import FitDocument, HeldOutSplit
    from analysis.points.table import CheckedPoints

Drawing = tuple[str, tuple[float, float], "Callable[[Figure], None]"]
"""A figure's name, its width and height in inches, and what draws it."""


def draw_figures(points: CheckedPoints, document: FitDocument, out: Path) -> list[Path]:
    """Write every figure as SVG and PNG into `out`; returns the files written."""
    laws = spreads(points, document)
    inputs = law_named(document.law).columns
    two = "n_params" in inputs and len(inputs) > 1
    figures: list[Drawing] = []
    if "n_params" in inputs:
        figures.append(("main", (7.2, 4.8), lambda f: _main(f, laws, document)))
        figures.append(
            ("loss_vs_parameters", _wide(laws), lambda f: _families(f, laws, document, "n_params"))
        )
    if two or "n_params" not in inputs:
        figures.append(("loss_vs_budget", _wide(laws), lambda f: _families(f, laws, document, "budget")))
    if ratio_rows(document):
        figures.append(("size_ratio", (7.2, 4.2), lambda f: _ratio(f, document)))
    if has_optima(document):
        figures.append(("compute_optimal", (7.2, 4.6), lambda f: draw_optima(f, document)))
    figures.append(("residuals", _wide(laws), lambda f: _residuals(f, laws, document)))
    if flat_parameters(document):
        figures.append(("profiles", profile_size(document), lambda f: draw_profiles(f, document)))
    return save_figures(figures, out)


def save_figures(figures: Sequence[Drawing], out: Path) -> list[Path]:
    """Draw each figure of that size in inches and write it as SVG and PNG into `out`; returns the files written."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    out.mkdir(parents=True, exist_ok=True)
    written = []
    with mpl.rc_context(RC):  # type: ignore[arg-type]
        for name, size, draw in figures:
            figure = Figure(figsize=size, layout="constrained")
            draw(figure)
            for suffix, options in ((".svg", {"metadata": {"Date": None}}), (".png", {"dpi": 160})):
                path = out / f"{name}{suffix}"
                figure.savefig(path, facecolor="white", **options)
                written.append(path)
    return written


def _wide(laws: Sequence[Spread]) -> tuple[float, float]:
    return (max(6.4, 5.2 * min(len(laws), 2)), 4.7 * ((len(laws) + 1) // 2))


def _panels(figure: Figure, laws: Sequence[Spread]) -> list[Axes]:
    columns = min(len(laws), 2)
    rows = (len(laws) + columns - 1) // columns
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    flat: list[Axes] = list(grid.ravel())
    for spare in flat[len(laws) :]:
        spare.set_visible(False)
    return flat[: len(laws)]


def _main(figure: Figure, laws: Sequence[Spread], document: FitDocument) -> None:
    """Every point of every architecture; the longest budget in full colour with its ribbon, the others faint."""
    axes = figure.subplots()
    names = [law.name for law in laws]
    for law in laws:
        base = colour(law.name, names)
        budgets = law.budgets
        for budget in budgets:
            strong = budget == budgets[-1]
            rows = law.curve.frame[law.curve.frame[law.budget] == budget]
            tone = base if strong else shade(base, 0.38)
            line = law.over_sizes(float(budget))
            axes.plot(line.x, line.loss, color=tone, lw=2.2 if strong else 1.1, zorder=3 if strong else 2)
            axes.scatter(
                rows["n_params"],
                rows["loss"],
                s=34 if strong else 18,
                color=tone,
                lw=0.8,
                ec="white",
                zorder=5 if strong else 4,
            )
            if strong:
                axes.fill_between(line.x, line.low, line.high, color=base, alpha=0.14, lw=0, zorder=1)
        axes.plot([], [], color=base, marker="o", lw=2.2, label=wording.architecture(law.name))
    _log_sizes(axes, laws)
    _log_loss(axes, np.concatenate([law.curve.frame["loss"].to_numpy(dtype=np.float64) for law in laws]))
    _equal_loss_arrow(axes, document, names)
    axes.set_ylabel(LOSS)
    unit = laws[0].budget
    counts = sorted({float(value) for law in laws for value in law.budgets})
    shown = [f"{value:,.0f}" if unit == "iterations" else wording.human(value) for value in counts]
    axes.set_title(f"Loss against size after {shown[-1]} {unit}, fitted law and 95 % interval")
    if len(shown) > 1:
        axes.plot(
            [], [], color="#9AA5B1", marker="o", ms=4, lw=1.1, label=f"faint: {', '.join(shown[:-1])} {unit}"
        )
    axes.legend(loc="best")


def _equal_loss_arrow(axes: Axes, document: FitDocument, names: Sequence[str]) -> None:
    from matplotlib.patheffects import withStroke

    left, right = axes.get_xlim()
    for name in names:
        row = main_row(document, name)
        if row is None or row.n_params is None or row.estimate is None or not left <= row.n_params <= right:
            continue
        if 1 / 1.15 <= row.estimate <= 1.15:
            continue
        tone = colour(name, names)
        axes.annotate(
            "",
            xy=(row.n_params, row.loss),
            xytext=(row.reference_n_params, row.loss),
            arrowprops={"arrowstyle": "->", "color": INK, "lw": 1.2, "shrinkA": 4, "shrinkB": 0},
            zorder=6,
        )
        axes.text(
            float(np.sqrt(row.n_params * row.reference_n_params)),
            row.loss * 1.004,
            wording.saving(row.estimate),
            color=tone,
            ha="center",
            va="bottom",
            fontsize=9.5,
            fontweight="bold",
            path_effects=[withStroke(linewidth=3, foreground="white")],
            zorder=7,
        )


def _families(figure: Figure, laws: Sequence[Spread], document: FitDocument, against: str) -> None:
    """A panel an architecture, a line for each value held fixed, and what was left out with its prediction."""
    panels = _panels(figure, laws)
    names = [law.name for law in laws]
    for axes, law in zip(panels, laws, strict=True):
        by_size = against == "n_params"
        held = law.budgets if by_size else law.sizes
        column, fixed = ("n_params", law.budget) if by_size else (law.budget, "n_params")
        for i, (value, tone) in enumerate(zip(held, shades(colour(law.name, names), len(held)), strict=True)):
            line = law.over_sizes(float(value)) if by_size else law.over_budgets(float(value))
            rows = law.curve.frame[law.curve.frame[fixed] == value]
            axes.fill_between(line.x, line.low, line.high, color=tone, alpha=0.13, lw=0)
            axes.plot(line.x, line.loss, color=tone, lw=1.8)
            axes.scatter(
                rows[column],
                rows["loss"],
                s=30,
                color=tone,
                marker=MARKERS[i % len(MARKERS)],
                ec="white",
                lw=0.7,
                zorder=4,
            )
            text = (
                (f"{value:,.0f} {fixed}" if fixed == "iterations" else f"{wording.human(value)} {fixed}")
                if by_size
                else (f"{wording.human(value)} parameters")
            )
            axes.plot([], [], color=tone, marker=MARKERS[i % len(MARKERS)], lw=1.8, label=text)
        fit = document.architectures[law.name]
        split = fit.heldout.largest_size if by_size else fit.heldout.longest_budget
        _mark_left_out(axes, split, column)
        axes.set_title(wording.architecture(law.name))
        if by_size:
            _log_sizes(axes, laws)
        else:
            _log_budgets(axes, laws)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, fontsize=8.5, columnspacing=1.2)
    losses = np.concatenate([law.curve.frame["loss"].to_numpy(dtype=np.float64) for law in laws])
    _log_loss(panels[0], losses)
    for axes in panels[::2]:
        axes.set_ylabel(LOSS)


def _mark_left_out(axes: Axes, split: HeldOutSplit | None, column: str) -> None:
    if split is None:
        return
    x = [getattr(point, column) for point in split.points]
    axes.scatter(
        x,
        [point.loss for point in split.points],
        s=85,
        facecolor="none",
        edgecolor=INK,
        lw=0.9,
        zorder=6,
        label="left out for the held-out error",
    )
    axes.scatter(
        x,
        [point.predicted for point in split.points],
        s=36,
        marker="x",
        color=INK,
        lw=1.1,
        zorder=6,
        label="predicted without them",
    )


def _ratio(figure: Figure, document: FitDocument) -> None:
    """Size ratio at the largest trained reference against the budget, hollow where it is an extrapolation."""
    axes = figure.subplots()
    comparison = document.comparison
    names = [*document.architectures]
    rows = ratio_rows(document)
    largest = rows[0].reference_n_params
    unit = "iterations" if rows[0].iterations is not None else "tokens"
    arms = [name for name in names if name != comparison.reference]
    seen: list[float] = [1.0]
    for k, name in enumerate(arms):
        tone = colour(name, names)
        own = [row for row in rows if row.architecture == name]
        for row in own:
            assert row.estimate is not None
            x = (row.iterations or row.tokens) * 1.02 ** (k - (len(arms) - 1) / 2)
            low, high = bar(row.estimate, row.estimate_ci95)
            seen += [
                row.estimate,
                min(max(low, row.estimate / 10), row.estimate),
                max(min(high, row.estimate * 10), row.estimate),
            ]
            axes.plot(
                [x, x],
                [low, high],
                color=tone,
                lw=2.0,
                alpha=0.55,
                solid_capstyle="butt",
                zorder=3,
            )
            axes.plot(
                x,
                row.estimate,
                "o",
                ms=8,
                color=tone,
                mfc=tone if row.status == "identified" else "white",
                mew=1.8,
                zorder=4,
            )
        if own:
            axes.plot([], [], "o-", color=tone, lw=2, label=f"{wording.architecture(name)}, 95 % interval")
    if any(row.status == "extrapolated" for row in rows):
        axes.plot(
            [], [], "o", color=INK, mfc="white", mew=1.5, label="hollow: equal size outside the trained sizes"
        )
    axes.axhline(1.0, color="#7B8794", lw=1.2, ls=(0, (4, 3)))
    axes.set_xscale("log")
    axes.set_yscale("log")
    budgets = sorted({float(row.iterations or row.tokens) for row in rows})
    axes.set_xlim(budgets[0] / 1.25, budgets[-1] * 1.25)
    set_ticks(
        axes,
        "x",
        budgets if len(budgets) <= 8 else plain_ticks(budgets[0], budgets[-1]),
        lambda v: f"{v:,.0f}" if unit == "iterations" else wording.human(v),
    )
    low, high = min(seen) / 1.35, max(seen) * 1.35
    axes.set_ylim(low, high)
    set_ticks(axes, "y", plain_ticks(low, high), lambda v: f"{v:g}×")
    axes.set_xlabel(budget_label(unit))
    axes.set_ylabel("size ratio (times fewer parameters)")
    axes.set_title(
        f"Size ratio to the {wording.human(largest)}-parameter "
        f"{wording.architecture(comparison.reference)} at equal loss"
    )
    axes.legend(loc="best")


def _residuals(figure: Figure, laws: Sequence[Spread], document: FitDocument) -> None:
    """Relative error of the fit at every point, and of the fits that had not seen it."""
    panels = _panels(figure, laws)
    names = [law.name for law in laws]
    for axes, law in zip(panels, laws, strict=True):
        frame = law.curve.frame
        budgets = np.unique(frame[law.budget].to_numpy(dtype=np.float64))
        tones = shades(colour(law.name, names), min(len(budgets), 8))
        fitted = law.fitted()
        for i, budget in enumerate(budgets):
            k = i * len(tones) // len(budgets)
            pick = (frame[law.budget] == budget).to_numpy()
            label = (
                f"{budget:,.0f} iterations"
                if law.budget == "iterations"
                else f"{wording.human(budget)} tokens"
            )
            axes.scatter(
                frame["n_params"][pick],
                100 * (frame["loss"][pick] / fitted[pick] - 1),
                s=32,
                color=tones[k],
                marker=MARKERS[k % len(MARKERS)],
                ec="white",
                lw=0.7,
                zorder=4,
                label=label if len(budgets) <= 8 else None,
            )
        for split, marker, text in (
            (document.architectures[law.name].heldout.largest_size, "D", "held out: largest size"),
            (document.architectures[law.name].heldout.longest_budget, "s", "held out: longest budget"),
        ):
            if split is not None:
                axes.scatter(
                    [point.n_params for point in split.points],
                    [100 * (point.loss / point.predicted - 1) for point in split.points],
                    s=52,
                    marker=marker,
                    facecolor="none",
                    edgecolor=INK,
                    lw=0.9,
                    zorder=3,
                    label=text,
                )
        axes.axhline(0, color="#7B8794", lw=1.2)
        axes.set_title(wording.architecture(law.name))
        _log_sizes(axes, laws)
    for axes in panels[::2]:
        axes.set_ylabel("loss seen above the law (%)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(3, max(1, len(labels))), fontsize=8.5
    )


def _log_sizes(axes: Axes, laws: Sequence[Spread]) -> None:
    sizes = np.concatenate([law.curve.sizes for law in laws])
    low, high = float(sizes.min()) / 1.25, float(sizes.max()) * 1.25
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    set_ticks(axes, "x", plain_ticks(low, high), wording.human)
    axes.set_xlabel(PARAMETERS)


def _log_budgets(axes: Axes, laws: Sequence[Spread]) -> None:
    budgets = np.unique(np.concatenate([law.budgets for law in laws]))
    unit = laws[0].budget
    axes.set_xscale("log")
    axes.set_xlim(float(budgets[0]) / 1.2, float(budgets[-1]) * 1.2)
    spaced = len(budgets) <= 6 and (len(budgets) < 2 or float((budgets[1:] / budgets[:-1]).min()) > 1.2)
    ticks = (
        [float(value) for value in budgets] if spaced else plain_ticks(float(budgets[0]), float(budgets[-1]))
    )
    set_ticks(axes, "x", ticks, (lambda v: f"{v:,.0f}") if unit == "iterations" else wording.human)
    axes.set_xlabel(budget_label(unit))


def _log_loss(axes: Axes, losses: Array) -> None:
    low, high, ticks, text = linear_ticks(losses)
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    set_ticks(axes, "y", ticks, text)
