"""The figures of a fit, each described once for the files and for the page."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from analysis import text as wording
from analysis.laws.catalogue import law_named
from analysis.report.curves import Scene, Told, budget_axis, key, level
from analysis.report.description import Arrow, Axis, Band, Figure, Panel, Series
from analysis.report.headlines import main_row, ratio_rows
from analysis.report.residuals import residual_figures
from analysis.report.style import GREY, INK, LEVEL_MARKERS, budget_label, log_axis, power, shade, shades

if TYPE_CHECKING:
    from analysis.findings.isoflop import Optimum
    from analysis.findings.results import FitDocument, HeldOutSplit
    from analysis.points.table import CheckedPoints

GREEK = {"alpha": "α", "beta": "β"}
PROFILE_HEIGHT = 6.0
"""Height up to which a profile is shown above its minimum, in units of its 95 % limit."""
SAME_SIZE = 1.15
"""Factor between two sizes of equal loss below which an arrow does not fit between them."""
FEW = 4
"""Most architectures of which the main figure draws the laws of all budgets."""


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
    figures += residual_figures(scene)
    if _flat_parameters(document):
        figures.append(_profiles(scene))
    return figures


def _main(scene: Scene) -> Figure:
    """Draw all architectures on one pair of axes, the longest budget in full colour and the others faint.

    Of more than FEW architectures it has the laws of the longest budget alone, without intervals, and all points.
    """
    faint: list[Series] = []
    strong: list[Series] = []
    bands: list[Band] = []
    levels = scene.levels(scene.unit) or []
    tops = set()
    for law in scene.laws:
        name, budgets = law.name, law.values(scene.unit)
        own = [one for one in levels if one.holds(budgets).any()]
        top, tone, pale = own[-1], scene.tone(name), shade(scene.tone(name), 0.38)
        tops.add(top)
        mark = scene.mark(name)
        line, band = law.line(top.within(budgets), tone, name)
        strong.append(replace(line, legend=wording.architecture(name), width=2.2))
        strong += scene.dots(
            Series((), (), tone, name, marker=mark), law.frame[top.holds(budgets)], "n_params"
        )
        if len(scene.laws) <= FEW:
            bands.append(band)
            shorter = [law.line(one.within(budgets), pale, name)[0] for one in own[:-1]]
            faint += [replace(one, width=1.1) for one in shorter]
        rest = law.frame[~top.holds(budgets)]
        if len(rest):
            faint += scene.dots(Series((), (), pale, name, marker=mark, size=4.5), rest, "n_params")
    x = scene.sizes()
    longest = scene.written(scene.unit, levels[-1])
    arrows = _equal_losses(scene, x)
    after = f"after {longest}" if len(tops) == 1 else "at the longest budget of each"
    caption = f"Loss against size {after}: lines are the fitted law"
    caption += ", with its 95 % interval." if bands else "; the next figure has its intervals."
    keys = []
    if faint:
        lines = " and laws" if len(scene.laws) <= FEW else ""
        caption += f" Faint: the points{lines} of shorter budgets."
        keys = [key("faint: shorter budgets", "circle", tone=GREY, dash="solid" if lines else "none", size=4)]
    if arrows:
        which = "of equal loss that the headline compares"
        caption += (
            f" The dotted line joins the two sizes {which}."
            if len(arrows) == 1
            else (f" Dotted lines join the sizes {which} with the reference's.")
        )
    title = f"Loss against size {after}, fitted law{' and 95 % interval' if bands else ''}"
    series = (*faint, *strong)
    return Figure(
        name="main",
        title="Both architectures at equal budgets"
        if len(scene.laws) == 2 and len(tops) == 1
        else "Loss against size",
        caption=caption + scene.told,
        panels=(Panel(title, x, scene.losses(), series, tuple(bands), tuple(arrows)),),
        keys=tuple(keys),
        inches=(7.2, 4.8),
    )


def _equal_losses(scene: Scene, x: Axis) -> list[Arrow]:
    """Draw an arrow from the reference's size to each architecture's at equal loss, if both are on the axis."""
    arrows = []
    left, right = x.limits or (0, np.inf)
    for name in scene.names:
        row = main_row(scene.document, name)
        if row is None or row.status == "not_identified" or row.n_params is None or row.estimate is None:
            continue
        if not left <= row.n_params <= right:
            continue
        if not 1 / SAME_SIZE <= row.estimate <= SAME_SIZE:
            ends = (row.reference_n_params, row.n_params)
            at, more = (f"{row.loss:.4f} nats at {wording.human(size)} parameters" for size in ends)
            saved = wording.saving(row.estimate)
            hover = (at, f"{wording.architecture(name)}: {saved}\n{more}")
            text = wording.saving(row.estimate, "×")
            arrows.append(Arrow(ends, row.loss, text, INK, f"equal loss: {text}", hover))
    if len(arrows) > 1:
        return [replace(one, text="", legend="equal loss") for one in arrows]
    return arrows


def _families(scene: Scene, *, by_size: bool) -> Figure:
    """Draw a panel for each architecture, with a line for each budget (or size) and the held-out predictions."""
    x, y, unit = scene.sizes() if by_size else scene.budgets(), scene.losses(), scene.unit
    column, fixed = ("n_params", unit) if by_size else (unit, "n_params")
    common = scene.levels(fixed) if len(scene.laws) > 1 else None
    panels, rings = [], False
    for law in scene.laws:
        levels, values = common or law.levels(fixed), law.values(fixed)
        series: list[Series] = []
        bands: list[Band] = []
        for i, (one, tone) in enumerate(zip(levels, shades(scene.tone(law.name), len(levels)), strict=True)):
            hit = one.holds(values)
            if not hit.any():
                continue
            group = f"level-{i}" if common else f"{law.name}-{i}"
            line, band = law.line(one.within(values), tone, group, by_size=by_size)
            bands.append(band)
            series.append(replace(line, legend="" if common else scene.written(fixed, one)))
            series += scene.dots(Series((), (), tone, group, marker=LEVEL_MARKERS[i]), law.frame[hit], column)
        heldout = scene.document.architectures[law.name].heldout
        left_out = _left_out(scene, heldout.largest_size if by_size else heldout.longest_budget, column)
        rings = rings or bool(left_out)
        panels.append(Panel(wording.architecture(law.name), x, y, (*series, *left_out), tuple(bands)))
    shown = len(common) if common else max(len(law.levels(fixed)) for law in scene.laws)
    held = ("iteration count" if unit == "iterations" else "token count") if by_size else "size"
    caption = f"{'All points and seeds' if scene.seeds else 'All points'}. "
    caption += f"Lines: the fitted law, one for each {held}" if shown > 1 else "Line: the fitted law"
    if any(not one.single for law in scene.laws for one in common or law.levels(fixed)):
        caption += " or range of them, at its highest"
    caption += "; ribbons: its 95 % interval."
    if rings:
        where = "the largest sizes" if by_size else "the longest budgets"
        caption += f" Rings: {where}, held out once; crosses: the predictions of the law fitted without them."
    greys = shades(INK, len(common or ()))
    return Figure(
        name="loss_vs_parameters" if by_size else "loss_vs_budget",
        title="Loss against parameters" if by_size else f"Loss against {budget_label(unit)}",
        caption=caption + scene.told,
        panels=tuple(panels),
        columns=scene.columns,
        keys=tuple(
            key(scene.written(fixed, one), LEVEL_MARKERS[i], greys[i], f"level-{i}", dash="solid")
            for i, one in enumerate(common or ())
        ),
        inches=scene.inches,
    )


def _left_out(scene: Scene, split: HeldOutSplit | None, column: str) -> list[Series]:
    """Draw rings around the points held out of a fit, and crosses at its predictions for them."""
    if split is None:
        return []
    points = split.points
    x, predicted, seen = (
        np.array([getattr(point, name) for point in points], dtype=float)
        for name in (column, "predicted", "loss")
    )

    def tell(places: list[int]) -> Told:
        told = [points[place] for place in places]
        texts = (f"{one.run_id}: {wording.percent(one.relative_error)} predicted without it" for one in told)
        return tuple(texts), ()

    cross = Series((), (), INK, "predicted", "predicted without them", marker="thin-x", fills=("none",))
    ring = Series(
        (), (), INK, "left out", "left out for the held-out error", marker="circle", size=9, fills=("none",)
    )
    return [*scene.split(cross, x, predicted, tell), *scene.split(ring, x, seen, tell)]


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
                legend=wording.architecture(name),
                marker=scene.mark(name),
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
    series.append(level(1.0, x, "dash", "equal size"))
    base = wording.architecture(scene.document.comparison.reference)
    title = f"Size ratio to the {wording.human(rows[0].reference_n_params)}-parameter {base}"
    caption = "How many times fewer parameters reach the same loss at the same budget; above 1 the architecture is the "
    caption += "smaller one."
    if any(row.estimate_ci95 for row in rows):
        caption += " Bars: 95 % interval."
    hollow = [row for row in rows if row.status != "identified"]
    if hollow:
        caption += " Hollow: outside what was trained."
    return Figure(
        name="size_ratio",
        title=title,
        caption=caption,
        panels=(Panel(f"{title} at equal loss", x, y, tuple(series)),),
        keys=(key("hollow: outside what was trained", "circle", fills=("white",)),) if hollow else (),
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
        exponent = found.exponents.get("parametric")
        parabolas = [one for one in found.optima if one.corrected is not None]
        by_law = [one for one in found.optima if one.parametric is not None]
        law = _sizes(by_law, "parametric", tone, name)
        corrected = _sizes(parabolas, "corrected", tone, name)
        envelope = _sizes(found.optima, "envelope", tone, name)
        series += [
            replace(
                law,
                legend=arm + ("" if exponent is None else f": N ∝ C^{exponent.value:.2f}"),
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
                marker=scene.mark(name),
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
                marker="thin-x",
                hover=tuple(f"best trained size: {wording.human(size)}" for size in envelope.y),
            ),
        ]
    optima = [one for found in isoflop.values() for one in found.optima]
    keys = []
    caption = "Lines: the best size by the fitted law."
    if any(one.corrected is not None for one in optima):
        caption += " Marks: the lowest point of a parabola through the losses at equal compute, less its bias"
        keys.append(key("parabola at equal compute", "circle"))
        if any(one.corrected is not None and one.standing != "centred" for one in optima):
            caption += "; hollow if the sizes lie to one side of it or the bias was above a tenth"
            keys.append(key("hollow: off centre", "circle", fills=("white",)))
        caption += "."
    if any(one.envelope is not None for one in optima):
        caption += " Crosses: the best of the trained sizes."
        keys.append(key("best trained size", "thin-x"))
    if keys:
        caption += " Where they disagree, trust none of them far."
    title = "Compute-optimal size"
    x = log_axis("training FLOPs", [one.flops for one in optima], power, pad=1.4)
    y = log_axis("parameters", [size for one in series for size in one.y], wording.human, pad=1.4)
    methods = ", ".join(["by law", *(one.legend for one in keys if one.fills == ())])
    return Figure(
        name="compute_optimal",
        title=title,
        caption=caption,
        panels=(Panel(f"{title}, {methods}", x, y, tuple(series)),),
        keys=tuple(keys),
    )


def _sizes(optima: Iterable[Optimum], method: str, tone: str, group: str) -> Series:
    """Return the sizes of one method against FLOPs, where it has any."""
    found = [(one.flops, float(size)) for one in optima if (size := getattr(one, method)) is not None]
    return Series(tuple(flops for flops, _ in found), tuple(size for _, size in found), tone, group)


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
        if min(reach) > 0:
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


def _bar(ratio: float, ends: tuple[float, float] | None) -> tuple[float, float]:
    """Return the ends of an error bar on a log axis, at most a hundredfold from the ratio."""
    low, high = ends or (ratio, ratio)
    return min(max(low, ratio / 100), ratio * 100), max(min(high, ratio * 100), ratio / 100)
