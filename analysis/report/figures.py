"""The figures of a fit, each described once for the files and for the page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from analysis import text as wording
from analysis.findings.curve import spaced
from analysis.laws.catalogue import law_named
from analysis.report.curves import DRAWN, Scene, budget_axis, counted, dots, drawn, floats, key, level, marks
from analysis.report.description import Arrow, Axis, Band, Figure, Marker, Panel, Series
from analysis.report.headlines import main_row, ratio_rows
from analysis.report.style import GREY, INK, MARKERS, budget_label, log_axis, shade, shades

if TYPE_CHECKING:
    from analysis.findings.isoflop import Optimum
    from analysis.findings.results import FitDocument, HeldOutPoint, HeldOutSplit
    from analysis.points.table import CheckedPoints

GREEK = {"alpha": "α", "beta": "β"}
PROFILE_HEIGHT = 6.0
"""Height up to which a profile is shown above its minimum, in units of its 95 % limit."""
SAME_SIZE = 1.15
"""Factor between two sizes of equal loss below which an arrow does not fit between them."""


def fit_figures(points: CheckedPoints, document: FitDocument) -> list[Figure]:
    """Describe every figure that the law and the points allow."""
    scene = Scene.of(points, document)
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
    """Draw all architectures on one pair of axes, the longest budget in full colour and the others faint."""
    series: list[Series] = []
    bands: list[Band] = []
    for law in scene.laws:
        for value in law.budgets.tolist():
            strong = value == law.budgets[-1]
            tone = scene.tone(law.name) if strong else shade(scene.tone(law.name), 0.38)
            group = f"{law.name}-{value}"
            line, band = law.line(value, tone, group)
            legend = f"{wording.architecture(law.name)}, {law.written(value)}"
            series += [
                replace(line, legend=legend, width=2.2 if strong else 1.1, summed=not strong),
                dots(law.rows(law.budget, value), "n_params", tone, group, size=6 if strong else 4.5),
            ]
            bands += [band] if strong else []
    unit, x = scene.unit, scene.sizes()
    values = sorted({value for law in scene.laws for value in law.budgets.tolist()})
    shown = [counted(unit)(value) for value in values]
    faint = f"faint: {', '.join(shown[:-1])} {unit}"
    keys = [key(faint, "circle", tone=GREY, dash="solid", size=4)] if len(shown) > 1 else []
    arrows = _equal_losses(scene, x)
    caption = (
        "Held-out loss against size. Strong: the longest budget with the law's 95 % interval; faint: the "
        "shorter ones."
    )
    if arrows:
        caption += " The dotted line joins the two sizes of equal loss that the headline compares."
    caption += scene.left_out
    title = f"Loss against size after {shown[-1]} {unit}, fitted law and 95 % interval"
    return Figure(
        name="main",
        title="Both architectures at equal budgets" if len(scene.laws) == 2 else "Loss against size",
        caption=caption,
        panels=(Panel(title, x, scene.losses(), tuple(series), tuple(bands), tuple(arrows), tuple(keys)),),
        inches=(7.2, 4.8),
    )


def _equal_losses(scene: Scene, x: Axis) -> list[Arrow]:
    """Draw an arrow from the reference's size to each architecture's at equal loss, if both are on the axis."""
    arrows = []
    left, right = x.limits or (0, np.inf)
    for name in scene.names:
        row = main_row(scene.document, name)
        if row is None or row.n_params is None or row.estimate is None or not left <= row.n_params <= right:
            continue
        if not 1 / SAME_SIZE <= row.estimate <= SAME_SIZE:
            ends = (row.reference_n_params, row.n_params)
            at, more = (f"{row.loss:.4f} nats at {wording.human(size)} parameters" for size in ends)
            legend = f"equal loss: {wording.saving(row.estimate)}"
            text = wording.saving(row.estimate, "×")
            arrows.append(Arrow(ends, row.loss, text, scene.tone(name), legend, (at, more)))
    return arrows


def _families(scene: Scene, *, by_size: bool) -> Figure:
    """Draw a panel for each architecture, with a line for each budget (or size) and the held-out predictions."""
    x, y, unit = scene.sizes() if by_size else scene.budgets(), scene.losses(), scene.unit
    panels = []
    for law in scene.laws:
        column, fixed = ("n_params", law.budget) if by_size else (law.budget, "n_params")
        held = (law.budgets if by_size else law.sizes).tolist()
        series: list[Series] = []
        bands: list[Band] = []
        for i, (value, tone) in enumerate(zip(held, shades(scene.tone(law.name), len(held)), strict=True)):
            group = f"{law.name}-{i}"
            line, band = law.line(value, tone, group, by_size=by_size)
            legend = law.written(value) if by_size else f"{wording.human(value)} parameters"
            bands.append(band)
            series.append(replace(line, legend=legend))
            series.append(dots(law.rows(fixed, value), column, tone, group, MARKERS[i % len(MARKERS)]))
        heldout = scene.document.architectures[law.name].heldout
        series += _left_out(heldout.largest_size if by_size else heldout.longest_budget, column)
        panels.append(Panel(wording.architecture(law.name), x, y, tuple(series), tuple(bands)))
    where = "the largest size" if by_size else "the longest budget"
    kept = ("iteration counts" if unit == "iterations" else "token counts") if by_size else "sizes"
    return Figure(
        name="loss_vs_parameters" if by_size else "loss_vs_budget",
        title="Loss against parameters" if by_size else f"Loss against {budget_label(unit)}",
        caption=f"All points and seeds. Lines: the fitted law, one for each of the {kept}; ribbons: its 95 % "
        f"interval. Rings: {where}, held out once; crosses: the predictions of the law fitted without it."
        + scene.left_out,
        panels=tuple(panels),
        inches=scene.inches,
    )


def _left_out(split: HeldOutSplit | None, column: str) -> list[Series]:
    """Draw rings around the points held out of a fit, and crosses at its predictions for them."""
    if split is None:
        return []
    points = _few(split.points)
    x = [getattr(point, column) for point in points]
    hover = [f"{one.run_id}: {wording.percent(one.relative_error)} predicted without it" for one in points]
    predicted, seen = [point.predicted for point in points], [point.loss for point in points]
    return [
        marks(x, predicted, "predicted without them", "thin-x", size=6, hover=hover),
        marks(x, seen, "left out for the held-out error", "circle", size=9),
    ]


def _few(points: Sequence[HeldOutPoint]) -> list[HeldOutPoint]:
    return [points[place] for place in spaced(len(points), DRAWN)]


def _ratio(scene: Scene) -> Figure:
    """Draw the size ratio at the largest reference against the budget, hollow if it is an extrapolation."""
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
        aside = 1.02 ** (k - (len(arms) - 1) / 2)  # keeps the bars of several architectures apart
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
    x = budget_axis(unit, budgets, pad=1.25, at=budgets if len(budgets) <= 8 else ())
    y = log_axis("size ratio (times fewer parameters)", reach, lambda value: f"{value:g}×", pad=1.35)
    series.append(level(1.0, x, "dash", "equal size", summed=True))
    largest = wording.human(rows[0].reference_n_params)
    title = (
        f"Size ratio to the {largest}-parameter {wording.architecture(scene.document.comparison.reference)}"
    )
    hollow = key("hollow: equal size outside the trained sizes", "circle", fills=("white",))
    keys = (hollow,) if any(row.status == "extrapolated" for row in rows) else ()
    return Figure(
        name="size_ratio",
        title=title,
        caption="How many times fewer parameters reach the same loss at the same budget; above 1 the architecture is "
        "the smaller one. Bars: 95 % interval. Hollow: the equal size lies outside the trained sizes.",
        panels=(Panel(f"{title} at equal loss", x, y, tuple(series), keys=keys),),
        inches=(7.2, 4.2),
    )


def _optima(scene: Scene) -> Figure:
    """Draw the best size against FLOPs: law, corrected parabolas, envelope."""
    series: list[Series] = []
    isoflop = scene.document.isoflop
    for name, found in isoflop.items():
        if not found.optima:
            continue
        tone, arm = scene.tone(name), wording.architecture(name)
        power = found.exponents.get("parametric")
        parabolas = [one for one in found.optima if one.corrected is not None]
        by_law = [one for one in found.optima if one.parametric is not None]
        law = _sizes(by_law, "parametric", tone, name)
        corrected = _sizes(parabolas, "corrected", tone, f"{name}-isoflop")
        envelope = _sizes(found.optima, "envelope", tone, f"{name}-best")
        series += [
            replace(
                law,
                legend=arm + ("" if power is None else f", law: N ∝ C^{power.value:.2f}"),
                dash="solid",
                width=2,
                hover=tuple(
                    f"law: {wording.human(one.parametric or 0)} parameters at {wording.number(one.flops)} FLOPs"
                    + ("" if one.parametric_status == "identified" else f"\n{one.reasons['parametric']}")
                    for one in by_law
                ),
            ),
            replace(
                corrected,
                legend=f"{arm}, IsoFLOP parabola",
                summed=True,
                marker="circle",
                size=7,
                fills=tuple(tone if one.standing == "centred" else "white" for one in parabolas),
                hover=tuple(
                    f"parabola through {one.sizes} sizes: {wording.human(one.corrected or 0)}, before correction "
                    f"{wording.human(one.isoflop or 0)}\n{one.standing.replace('_', ' ')}"
                    for one in parabolas
                ),
            ),
            replace(
                envelope,
                legend=f"{arm}, best trained size",
                summed=True,
                marker="thin-x",
                hover=tuple(f"best trained size: {wording.human(size)}" for size in envelope.y),
            ),
        ]
    keys = (
        key("IsoFLOP parabola, corrected", "circle"),
        key("best trained size", "thin-x"),
        key("hollow: off centre", "circle", fills=("white",)),
    )
    title = "Compute-optimal size"
    budgets = [one.flops for found in isoflop.values() for one in found.optima]
    x = log_axis("training FLOPs", budgets, _power, pad=1.4)
    y = log_axis("parameters", [size for one in series for size in one.y], wording.human, pad=1.4)
    return Figure(
        name="compute_optimal",
        title=title,
        caption="Lines: the best size by the fitted law. Dots: the lowest point of a parabola through the losses at "
        "equal compute, less its bias off centre; hollow if the sizes lie to one side of it or the bias was above a "
        "tenth. Crosses: the best of the trained sizes. Where the three disagree, trust none of them far.",
        panels=(Panel(f"{title}, by law, parabola and envelope", x, y, tuple(series), keys=keys),),
    )


def _sizes(optima: Iterable[Optimum], method: str, tone: str, group: str) -> Series:
    """Return the sizes of one method against FLOPs, where it has any."""
    found = [(one.flops, float(size)) for one in optima if (size := getattr(one, method)) is not None]
    return Series(tuple(flops for flops, _ in found), tuple(size for _, size in found), tone, group)


def _residuals(scene: Scene) -> Figure:
    """Draw the relative error of the fit at every point, and of the fits without the held-out points."""
    x = scene.sizes()
    panels = []
    for law in scene.laws:
        frame = drawn(law.curve.frame)
        error = 100 * (floats(frame["loss"]) / law.curve.loss_of(frame) - 1)
        budgets, which = np.unique(floats(frame[law.budget]), return_inverse=True)
        tones = shades(scene.tone(law.name), min(len(budgets), len(MARKERS)))
        toned = which * len(tones) // len(budgets)
        series = [level(0.0, x, "solid")]
        for k, tone in enumerate(tones):
            legend = law.written(float(budgets[k])) if len(budgets) <= len(MARKERS) else ""
            points = dots(frame[toned == k], "n_params", tone, f"{law.name}-{k}", MARKERS[k])
            series.append(replace(points, y=tuple(error[toned == k].tolist()), legend=legend))
        heldout = scene.document.architectures[law.name].heldout
        left_out: tuple[tuple[HeldOutSplit | None, Marker, str], ...] = (
            (heldout.largest_size, "diamond", "held out: largest size"),
            (heldout.longest_budget, "square", "held out: longest budget"),
        )
        for split, marker, label in left_out:
            if split is not None:
                held = _few(split.points)
                sizes = [point.n_params for point in held]
                y = [100 * (point.loss / point.predicted - 1) for point in held]
                hover = [f"{point.run_id}\n{label}" for point in held]
                series.append(marks(sizes, y, label, marker, size=7.5, hover=hover))
        y_axis = Axis("loss seen above the law (%)")
        panels.append(Panel(wording.architecture(law.name), x, y_axis, tuple(series)))
    return Figure(
        name="residuals",
        title="Errors of the law",
        caption="Loss seen above the loss of the law, for points that the fit used and, hollow, for held-out points."
        + scene.left_out,
        panels=tuple(panels),
        inches=scene.inches,
    )


def _profiles(scene: Scene) -> Figure:
    """Draw a panel for each flat parameter, with a curve for each architecture."""
    panels = []
    for parameter in _flat_parameters(scene.document):
        series: list[Series] = []
        reach: list[float] = []
        for name, fit in scene.document.architectures.items():
            curve = fit.profile.get(parameter)
            if curve is None:
                continue
            reach += [curve.values[0], curve.values[-1]]
            tone, lowest = scene.tone(name), min(curve.objective)
            above = (np.array(curve.objective) - lowest) / max(curve.allowed - lowest, 1e-300)
            height = tuple(np.minimum(above, 1e3).tolist())
            hover = tuple(f"{parameter} = {wording.number(value)}" for value in curve.values)
            estimate = fit.params[parameter]
            said = (f"{parameter} = {wording.number(estimate, 4)}",)
            legend = wording.architecture(name)
            series += [
                Series(curve.values, height, tone, name, legend, dash="solid", width=2, hover=hover),
                Series((estimate,), (0.0,), tone, name, marker="circle", size=7, hover=said),
            ]
        label = GREEK.get(parameter, parameter)
        x = Axis(label, (min(reach), max(reach)))
        if parameter != "E":
            x = log_axis(label, reach, lambda value: wording.number(value, 1), pad=1, most=3)
        series.append(level(1.0, x, "dash", "end of the 95 % interval", tone=INK))
        panels.append(Panel("", x, Axis("objective above its minimum", (0, PROFILE_HEIGHT)), tuple(series)))
    return Figure(
        name="profiles",
        title="Parameters that the points do not identify",
        caption="Objective minimised over all other parameters, for each parameter whose profile is flat towards one "
        "end: above its minimum, in units of the nominal 95 % limit. Where a curve leaves the figure below the dashed "
        "line, the interval of the parameter has no end. Dots: the estimates.",
        panels=tuple(panels),
        columns=3,
        inches=(3.4 if len(panels) > 1 else 6.8, 3.4),
    )


def _flat_parameters(document: FitDocument) -> list[str]:
    """Return the parameters whose profile has an open end for some architecture."""
    profiles = [fit.profile for fit in document.architectures.values()]
    flat = {name for profile in profiles for name, curve in profile.items() if None in curve.interval}
    return [name for name in dict.fromkeys(name for profile in profiles for name in profile) if name in flat]


def _power(value: float) -> str:
    return wording.number(value, 1) if value >= 1e6 else f"{value:g}"


def _bar(ratio: float, ends: tuple[float, float] | None) -> tuple[float, float]:
    """Return the ends of an error bar on a log axis, at most a hundredfold from the ratio."""
    low, high = ends or (ratio, ratio)
    return min(max(low, ratio / 100), ratio * 100), max(min(high, ratio * 100), ratio / 100)
