"""The figures of a fit, each described once for the files and for the page; every point says which run it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from analysis import text as wording
from analysis.laws.catalogue import law_named
from analysis.laws.law import Array
from analysis.report.curves import Line, Spread, spreads
from analysis.report.description import Arrow, Axis, Band, Dash, Figure, Marker, Panel, Series
from analysis.report.headlines import main_row, ratio_rows
from analysis.report.style import (
    GREY,
    INK,
    MARKERS,
    budget_label,
    colour,
    log_axis,
    loss_axis,
    shade,
    shades,
)

if TYPE_CHECKING:
    import pandas as pd

    from analysis.findings.results import FitDocument, HeldOutSplit, ProfileCurve
    from analysis.points.table import CheckedPoints

GREEK = {"alpha": "α", "beta": "β"}
PROFILE_HEIGHT = 6.0
"""How far above its minimum a profile is shown, in units of what its interval allows."""
SAME_SIZE = 1.15
"""Two sizes of equal loss that differ by no more than this factor leave an arrow between them no room."""


@dataclass(frozen=True)
class Scene:
    """What every figure is made from: the fitted curves with their points, and the document."""

    laws: Sequence[Spread]
    document: FitDocument

    @property
    def names(self) -> list[str]:
        """Architectures, the reference first."""
        return [law.name for law in self.laws]

    def tone(self, name: str) -> str:
        """Colour of an architecture."""
        return colour(name, self.names)

    def sizes(self) -> Axis:
        """Horizontal axis over all trained sizes."""
        trained = np.concatenate([law.curve.sizes for law in self.laws])
        return log_axis("parameters", trained, wording.human, pad=1.25)

    def budgets(self) -> Axis:
        """Horizontal axis over all trained budgets, with a tick at each where there are few, well apart."""
        budgets, unit = np.unique(np.concatenate([law.budgets for law in self.laws])), self.laws[0].budget
        few = len(budgets) <= 6 and (len(budgets) < 2 or float((budgets[1:] / budgets[:-1]).min()) > 1.2)
        at = budgets.tolist() if few else ()
        return log_axis(budget_label(unit), budgets, _counted(unit), pad=1.2, at=at)

    def losses(self) -> Axis:
        """Vertical axis over all losses."""
        return loss_axis(np.concatenate([_floats(law.curve.frame["loss"]) for law in self.laws]))


def fit_figures(points: CheckedPoints, document: FitDocument) -> list[Figure]:
    """Describe every figure that the law and the points allow."""
    scene = Scene(spreads(points, document), document)
    inputs = law_named(document.law).columns
    figures = []
    if "n_params" in inputs:
        figures += [_main(scene), _families(scene, by_size=True)]
    if len(inputs) > 1 or "n_params" not in inputs:
        figures.append(_families(scene, by_size=False))
    if ratio_rows(document):
        figures.append(_ratio(scene))
    if any(found.optima for found in document.isoflop.values()):
        figures.append(_optima(scene))
    figures.append(_residuals(scene))
    if _flat_parameters(document):
        figures.append(_profiles(scene))
    return figures


def _main(scene: Scene) -> Figure:
    """Both architectures on one pair of axes, the longest budget strong and the others faint."""
    series: list[Series] = []
    bands: list[Band] = []
    for law in scene.laws:
        for value in law.budgets.tolist():
            strong = value == law.budgets[-1]
            tone = scene.tone(law.name) if strong else shade(scene.tone(law.name), 0.38)
            group = f"{law.name}-{value}"
            line = law.over_sizes(value)
            legend = f"{wording.architecture(law.name)}, {wording.budget_of(law.budget, value)}"
            series += [
                _curve(line, tone, group, legend, width=2.2 if strong else 1.1, summed=not strong),
                _dots(_rows(law, law.budget, value), "n_params", tone, group, size=6 if strong else 4.5),
            ]
            bands += [_ribbon(line, tone, group)] if strong else []
    unit, x = scene.laws[0].budget, scene.sizes()
    counts = sorted({value for law in scene.laws for value in law.budgets.tolist()})
    shown = [_counted(unit)(value) for value in counts]
    faint = f"faint: {', '.join(shown[:-1])} {unit}"
    keys = [_key(faint, "circle", colour=GREY, dash="solid", size=4)] if len(shown) > 1 else []
    arrows = _equal_losses(scene, x)
    caption = (
        "Held-out loss against size. Strong: the longest budget with the law's 95 % interval; faint: the "
        "shorter ones."
    )
    if arrows:
        caption += " The dotted line joins the two sizes of equal loss that the headline speaks of."
    return Figure(
        name="main",
        title="Both architectures at equal budgets" if len(scene.laws) == 2 else "Loss against size",
        caption=caption,
        panels=(
            Panel(
                f"Loss against size after {shown[-1]} {unit}, fitted law and 95 % interval",
                x,
                scene.losses(),
                tuple(series),
                tuple(bands),
                tuple(arrows),
                tuple(keys),
            ),
        ),
        inches=(7.2, 4.8),
    )


def _equal_losses(scene: Scene, x: Axis) -> list[Arrow]:
    """From the reference's size to that of each architecture at equal loss, where both are apart and in sight."""
    arrows = []
    left, right = x.limits or (0, np.inf)
    for name in scene.names:
        row = main_row(scene.document, name)
        if row is None or row.n_params is None or row.estimate is None or not left <= row.n_params <= right:
            continue
        if not 1 / SAME_SIZE <= row.estimate <= SAME_SIZE:
            ends = (row.reference_n_params, row.n_params)
            at, more = (f"{row.loss:.4f} nats at {wording.human(size)} parameters" for size in ends)
            legend = f"equal loss: {wording.ratio_in_words(row.estimate)}"
            text = wording.saving(row.estimate)
            arrows.append(Arrow(ends, row.loss, text, scene.tone(name), legend, (at, more)))
    return arrows


def _families(scene: Scene, *, by_size: bool) -> Figure:
    """A panel an architecture, a line for each value held fixed, and what was left out with its prediction."""
    x, y, unit = scene.sizes() if by_size else scene.budgets(), scene.losses(), scene.laws[0].budget
    panels = []
    for law in scene.laws:
        column, fixed = ("n_params", law.budget) if by_size else (law.budget, "n_params")
        held = (law.budgets if by_size else law.sizes).tolist()
        series: list[Series] = []
        bands: list[Band] = []
        for i, (value, tone) in enumerate(zip(held, shades(scene.tone(law.name), len(held)), strict=True)):
            line = law.over_sizes(value) if by_size else law.over_budgets(value)
            legend = wording.budget_of(fixed, value) if by_size else f"{wording.human(value)} parameters"
            group = f"{law.name}-{i}"
            bands.append(_ribbon(line, tone, group))
            series.append(_curve(line, tone, group, legend))
            series.append(_dots(_rows(law, fixed, value), column, tone, group, MARKERS[i % len(MARKERS)]))
        heldout = scene.document.architectures[law.name].heldout
        split = heldout.largest_size if by_size else heldout.longest_budget
        panels.append(
            Panel(wording.architecture(law.name), x, y, (*series, *_left_out(split, column)), tuple(bands))
        )
    where = "the largest size" if by_size else "the longest budget"
    kept = ("iteration counts" if unit == "iterations" else "token counts") if by_size else "sizes"
    return Figure(
        name="loss_vs_parameters" if by_size else "loss_vs_budget",
        title="Loss against parameters" if by_size else f"Loss against {budget_label(unit)}",
        caption=f"Every point and every seed. Lines: the fitted law, one for each of the {kept}; ribbons: its 95 % "
        f"interval. Rings mark {where}, which was left out once; crosses are what the law fitted without it predicts.",
        panels=tuple(panels),
        inches=_inches(scene),
    )


def _left_out(split: HeldOutSplit | None, column: str) -> list[Series]:
    """Rings about the points left out of a fit, crosses where that fit predicts them."""
    if split is None:
        return []
    x = [getattr(point, column) for point in split.points]
    text = [
        f"{point.run_id}: {wording.percent(point.relative_error)} predicted without it"
        for point in split.points
    ]
    predicted = [point.predicted for point in split.points]
    return [
        _marks(x, predicted, "predicted without them", "thin-x", size=6, hover=text),
        _marks(
            x, [point.loss for point in split.points], "left out for the held-out error", "circle", size=9
        ),
    ]


def _ratio(scene: Scene) -> Figure:
    """Size ratio at the largest trained reference against the budget, hollow where it is an extrapolation."""
    rows = ratio_rows(scene.document)
    unit = "iterations" if rows[0].iterations is not None else "tokens"
    arms = list(dict.fromkeys(row.architecture for row in rows))
    series: list[Series] = []
    reach = [1.0]
    for k, name in enumerate(arms):
        own = [row for row in rows if row.architecture == name]
        ratios = [float(row.estimate or 0.0) for row in own]
        ends = [_bar(ratio, row.estimate_ci95) for row, ratio in zip(own, ratios, strict=True)]
        for (low, high), ratio in zip(ends, ratios, strict=True):
            reach += [ratio, max(low, ratio / 10), min(high, ratio * 10)]
        aside = 1.02 ** (k - (len(arms) - 1) / 2)  # else the bars of several architectures cover one another
        series.append(
            Series(
                x=tuple(aside * (row.iterations or row.tokens) for row in own),
                y=tuple(ratios),
                colour=scene.tone(name),
                group=name,
                legend=f"{wording.architecture(name)}, 95 % interval",
                marker="circle",
                size=8,
                fills=tuple(scene.tone(name) if row.status == "identified" else "white" for row in own),
                ends=tuple(ends),
                hover=tuple(
                    f"{wording.times(ratio)}× {wording.between(row.estimate_ci95, 2)}\n{row.status}\n"
                    f"at a loss of {row.loss:.4f} nats: {wording.human(row.n_params or 0)} parameters"
                    for row, ratio in zip(own, ratios, strict=True)
                ),
            )
        )
    budgets = sorted({float(row.iterations or row.tokens) for row in rows})
    at = budgets if len(budgets) <= 8 else ()
    x = log_axis(budget_label(unit), budgets, _counted(unit), pad=1.25, at=at)
    y = log_axis("size ratio (times fewer parameters)", reach, lambda value: f"{value:g}×", pad=1.35)
    largest = wording.human(rows[0].reference_n_params)
    title = (
        f"Size ratio to the {largest}-parameter {wording.architecture(scene.document.comparison.reference)}"
    )
    hollow = (
        [_key("hollow: equal size outside the trained sizes", "circle", fills=("white",))]
        if any(row.status == "extrapolated" for row in rows)
        else []
    )
    return Figure(
        name="size_ratio",
        title=title,
        caption="How many times fewer parameters reach the same loss at the same budget; above 1 the architecture is "
        "the smaller one. Bars: 95 % interval. Hollow: the equal size lies outside the sizes trained.",
        panels=(
            Panel(
                f"{title} at equal loss",
                x,
                y,
                (*series, _level(1.0, x, GREY, "dash", "equal size", summed=True)),
                keys=tuple(hollow),
            ),
        ),
        inches=(7.2, 4.2),
    )


def _optima(scene: Scene) -> Figure:
    """Best size against FLOPs: law, corrected parabolas, envelope."""
    series: list[Series] = []
    for name, found in scene.document.isoflop.items():
        tone, arm = scene.tone(name), wording.architecture(name)
        power = found.exponents.get("parametric")
        dots = [one for one in found.optima if one.corrected is not None]
        best = [one for one in found.optima if one.envelope is not None]
        if not found.optima:
            continue
        series += [
            Series(
                x=tuple(one.flops for one in found.optima),
                y=tuple(one.parametric for one in found.optima),
                colour=tone,
                group=name,
                legend=arm + ("" if power is None else f", law: N ∝ C^{power.value:.2f}"),
                dash="solid",
                width=2,
                hover=tuple(
                    f"law: {wording.human(one.parametric)} parameters at {wording.number(one.flops)} FLOPs"
                    for one in found.optima
                ),
            ),
            Series(
                x=tuple(one.flops for one in dots),
                y=tuple(one.corrected or 0.0 for one in dots),
                colour=tone,
                group=f"{name}-isoflop",
                legend=f"{arm}, IsoFLOP parabola",
                summed=True,
                marker="circle",
                size=7,
                fills=tuple(tone if one.standing == "centred" else "white" for one in dots),
                hover=tuple(
                    f"parabola through {one.sizes} sizes: {wording.human(one.corrected or 0)}, before correction "
                    f"{wording.human(one.isoflop or 0)}\n{one.standing.replace('_', ' ')}"
                    for one in dots
                ),
            ),
            Series(
                x=tuple(one.flops for one in best),
                y=tuple(one.envelope or 0.0 for one in best),
                colour=tone,
                group=f"{name}-best",
                legend=f"{arm}, best trained size",
                summed=True,
                marker="thin-x",
                hover=tuple(f"best trained size: {wording.human(one.envelope or 0)}" for one in best),
            ),
        ]
    optima = [one for found in scene.document.isoflop.values() for one in found.optima]
    sizes = [n for one in optima for n in (one.parametric, one.corrected, one.envelope) if n]
    keys = (
        _key("IsoFLOP parabola, corrected", "circle"),
        _key("best trained size", "thin-x"),
        _key("hollow: off centre", "circle", fills=("white",)),
    )
    title = "Compute-optimal size"
    return Figure(
        name="compute_optimal",
        title=title,
        caption="Lines: the size that the fitted law calls best for so much compute. Dots: the lowest point of a "
        "parabola through the losses at equal compute, its bias off centre taken off; hollow where the sizes lie to "
        "one side of it or the bias was above a tenth. Crosses: the best of the trained sizes. Where the three part, "
        "believe none of them far.",
        panels=(
            Panel(
                f"{title}, by law, parabola and envelope",
                log_axis("training FLOPs", [one.flops for one in optima], _power, pad=1.4),
                log_axis("parameters", sizes, wording.human, pad=1.4),
                tuple(series),
                keys=keys,
            ),
        ),
    )


def _residuals(scene: Scene) -> Figure:
    """Relative error of the fit at every point, and of the fits that had not seen it."""
    x = scene.sizes()
    panels = []
    for law in scene.laws:
        frame, fitted = law.curve.frame, law.fitted()
        budgets = np.unique(_floats(frame[law.budget]))
        tones = shades(scene.tone(law.name), min(len(budgets), len(MARKERS)))
        series = [_level(0.0, x, GREY, "solid")]
        for i, budget in enumerate(budgets.tolist()):
            k = i * len(tones) // len(budgets)
            pick = (frame[law.budget] == budget).to_numpy()
            error = 100 * (_floats(frame["loss"])[pick] / fitted[pick] - 1)
            legend = wording.budget_of(law.budget, budget) if len(budgets) <= len(MARKERS) else ""
            dots = _dots(frame[pick], "n_params", tones[k], f"{law.name}-{i}", MARKERS[k])
            series.append(replace(dots, y=tuple(error.tolist()), legend=legend))
        heldout = scene.document.architectures[law.name].heldout
        left_out: tuple[tuple[HeldOutSplit | None, Marker, str], ...] = (
            (heldout.largest_size, "diamond", "held out: largest size"),
            (heldout.longest_budget, "square", "held out: longest budget"),
        )
        for split, marker, label in left_out:
            if split is not None:
                sizes = [point.n_params for point in split.points]
                y = [100 * (point.loss / point.predicted - 1) for point in split.points]
                text = [f"{point.run_id}\n{label}" for point in split.points]
                series.append(_marks(sizes, y, label, marker, size=7.5, hover=text))
        y_axis = Axis("loss seen above the law (%)")
        panels.append(Panel(wording.architecture(law.name), x, y_axis, tuple(series)))
    return Figure(
        name="residuals",
        title="What the law misses",
        caption="Loss seen above the loss of the law, for points the fit has seen and, hollow, for points it had not.",
        panels=tuple(panels),
        inches=_inches(scene),
    )


def _profiles(scene: Scene) -> Figure:
    """A panel a flat parameter, a curve an architecture: a flat valley is best seen."""
    panels = []
    for parameter in _flat_parameters(scene.document):
        series: list[Series] = []
        reach: list[float] = []
        for name, fit in scene.document.architectures.items():
            curve = fit.profile.get(parameter)
            if curve is None:
                continue
            reach += [curve.values[0], curve.values[-1]]
            tone, group = scene.tone(name), name
            height = tuple(_height(curve).tolist())
            hover = tuple(f"{parameter} = {wording.number(value)}" for value in curve.values)
            estimate = fit.params[parameter]
            said = (f"{parameter} = {wording.number(estimate, 4)}",)
            legend = wording.architecture(name)
            series += [
                Series(curve.values, height, tone, group, legend, dash="solid", width=2, hover=hover),
                Series((estimate,), (0.0,), tone, group, marker="circle", size=7, hover=said),
            ]
        label = GREEK.get(parameter, parameter)
        x = Axis(label, (min(reach), max(reach)))
        if parameter != "E":
            x = log_axis(label, reach, lambda value: wording.number(value, 1), pad=1, most=3)
        series.append(_level(1.0, x, INK, "dash", "end of the 95 % interval"))
        y = Axis("objective above its minimum", (0, PROFILE_HEIGHT))
        panels.append(Panel("", x, y, tuple(series)))
    return Figure(
        name="profiles",
        title="What the points do not tell",
        caption="Objective minimised over all other parameters, for each parameter whose profile stays flat towards "
        "an end: above its minimum, in units of what the nominal 95 % interval allows. Where a curve leaves the "
        "figure below the dashed line, the points put no end to the parameter there. Dots: the estimates.",
        panels=tuple(panels),
        columns=3,
        inches=(3.4 if len(panels) > 1 else 6.8, 3.4),
    )


def _flat_parameters(document: FitDocument) -> list[str]:
    """Parameters whose profile has an open end in some architecture."""
    profiles = [fit.profile for fit in document.architectures.values()]
    flat = {name for profile in profiles for name, curve in profile.items() if None in curve.interval}
    return [name for name in dict.fromkeys(name for profile in profiles for name in profile) if name in flat]


def _height(curve: ProfileCurve) -> Array:
    lowest = min(curve.objective)
    room = max(curve.allowed - lowest, 1e-300)
    out: Array = np.minimum((np.array(curve.objective) - lowest) / room, 1e3)
    return out


def _curve(
    line: Line, tone: str, group: str, legend: str, *, width: float = 1.8, summed: bool = False
) -> Series:
    x, y = tuple(line.x.tolist()), tuple(line.loss.tolist())
    return Series(x, y, tone, group, legend, summed, "solid", width)


def _ribbon(line: Line, tone: str, group: str) -> Band:
    return Band(tuple(line.x.tolist()), tuple(line.low.tolist()), tuple(line.high.tolist()), tone, group)


def _dots(
    rows: pd.DataFrame, column: str, tone: str, group: str, marker: Marker = "circle", size: float = 6
) -> Series:
    """Points in one colour, each with what its run was."""
    hover = []
    columns = ("run_id", "n_params", "tokens", "iterations", "loss", "seed")
    for run_id, n_params, tokens, iterations, loss, seed in rows[list(columns)].itertuples(index=False):
        budget = wording.budget(None if np.isnan(iterations) else float(iterations), float(tokens))
        seed_text = "" if np.isnan(seed) else f", seed {seed:.0f}"
        hover.append(
            f"run {run_id}\n{wording.human(n_params)} parameters, {budget}{seed_text}\n"
            f"loss {loss:.4f} nats a token"
        )
    return Series(
        x=tuple(_floats(rows[column]).tolist()),
        y=tuple(_floats(rows["loss"]).tolist()),
        colour=tone,
        group=group,
        marker=marker,
        size=size,
        hover=tuple(hover),
        run_ids=tuple(map(str, rows["run_id"])),
    )


def _marks(
    x: Sequence[float],
    y: Sequence[float],
    label: str,
    marker: Marker,
    *,
    size: float,
    hover: Sequence[str] = (),
) -> Series:
    """What was left out of a fit, or predicted without it, in ink."""
    return Series(
        tuple(x), tuple(y), INK, label, label, marker=marker, size=size, fills=("none",), hover=tuple(hover)
    )


def _level(
    height: float, x: Axis, tone: str, dash: Dash, legend: str = "", *, summed: bool = False
) -> Series:
    """A horizontal line over the whole axis."""
    assert x.limits is not None
    return Series(x.limits, (height, height), tone, f"level {height}", legend, summed, dash, 1.2)


def _key(
    text: str,
    marker: Marker,
    *,
    colour: str = INK,
    dash: Dash = "none",
    size: float = 6,
    fills: tuple[str, ...] = (),
) -> Series:
    """An entry of a drawn legend that stands for marks in several colours."""
    return Series((), (), colour, text, text, dash=dash, width=1.1, marker=marker, size=size, fills=fills)


def _rows(law: Spread, column: str, value: float) -> pd.DataFrame:
    return law.curve.frame[law.curve.frame[column] == value]


def _floats(column: pd.Series) -> Array:
    return column.to_numpy(dtype=np.float64)


def _inches(scene: Scene) -> tuple[float, float]:
    return (5.2 if len(scene.laws) > 1 else 6.4), 4.7


def _counted(unit: str) -> Callable[[float], str]:
    return (lambda value: f"{value:,.0f}") if unit == "iterations" else wording.human


def _power(value: float) -> str:
    return wording.number(value, 1) if value >= 1e6 else f"{value:g}"


def _bar(ratio: float, ends: tuple[float, float] | None) -> tuple[float, float]:
    """Ends of an error bar on a log axis: an end at 0 or without limit is cut a hundredfold from the ratio."""
    low, high = ends or (ratio, ratio)
    return min(max(low, ratio / 100), ratio * 100), max(min(high, ratio * 100), ratio / 100)
