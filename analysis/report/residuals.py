"""Residuals of the fits against size, budget and compute, on which a wrong law shows.

A panel for each architecture has the zero line and a band of two robust standard deviations to either side. A point
far outside is drawn at the edge as a triangle that points to it: one diverged run hides no pattern in the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from analysis import text as wording
from analysis.fitting.scale import robust_scale
from analysis.laws.law import Array
from analysis.report.curves import FittedCurve, Scene, Told, level
from analysis.report.description import Axis, Band, Figure, Marker, Panel, Series
from analysis.report.levels import levels
from analysis.report.style import GREY, INK, log_axis, power, shades

if TYPE_CHECKING:
    from analysis.findings.results import HeldOutSplit

FAR = 8.0
"""Robust standard deviations from zero to the edge of a panel."""
EDGE = 0.95
"""Height of a triangle at the edge, as a share of the axis."""
UP: Marker = "triangle-up"
DOWN: Marker = "triangle-down"
Values = Callable[[FittedCurve], Array]


def residual_figures(scene: Scene) -> list[Figure]:
    """Describe the residuals against size, budget and compute: against those that vary, or against size alone."""
    counted = all(law.frame["flops"].notna().all() for law in scene.laws)

    def compute(law: FittedCurve) -> Array:
        return law.values("flops") if counted else 6 * law.values("n_params") * law.values("tokens")

    label = "training FLOPs" if counted else "6 × parameters × tokens"
    flops = np.concatenate([compute(law) for law in scene.laws])
    powers = log_axis(label, flops, power, pad=1.4, most=6)
    sides: tuple[tuple[str, str, Axis, Values], ...] = (
        ("residuals", "size", scene.sizes(), lambda law: law.values("n_params")),
        ("residuals_vs_budget", "budget", scene.budgets(), lambda law: law.values(scene.unit)),
        ("residuals_vs_compute", "compute", powers, compute),
    )
    varied = [
        side for side in sides if len(levels(np.concatenate([side[3](law) for law in scene.laws]), None)) > 1
    ]
    return [_figure(scene, *side) for side in varied or sides[:1]]


def _figure(scene: Scene, name: str, against: str, x: Axis, of: Values) -> Figure:
    """Draw a panel for each architecture, all with the same axes."""
    assert x.limits is not None
    width = len(scene.laws[0].curve.law.names)
    errors = {law.name: _percent(law.values("loss"), law.curve.loss_of(law.frame)) for law in scene.laws}
    spread = {
        arm: robust_scale(error, width) or None if len(error) > width else None
        for arm, error in errors.items()
    }
    held = {law.name: _held(scene, law.name, against) for law in scene.laws}
    furthest = max(
        float(np.abs(values).max())
        for values in (*errors.values(), *(_errors_of(split) for own in held.values() for split, *_ in own))
    )
    known = [sd for sd in spread.values() if sd]
    reach = max(1e-3, min(1.08 * furthest, FAR * max(known)) if known else 1.08 * furthest)
    y = Axis("log loss above the law (%)", (-reach, reach))
    panels, dark = [], False
    for law in scene.laws:
        error, sd, at = errors[law.name], spread[law.name], of(law)
        rows = law.frame.assign(at=at)
        series = [level(0.0, x, "solid")]
        shading = law.levels(scene.unit if against == "size" else "n_params")
        for one, tone in zip(shading, shades(scene.tone(law.name), len(shading)), strict=True):
            own = one.holds(law.values(scene.unit if against == "size" else "n_params"))
            plain = Series((), (), tone, law.name, marker=scene.mark(law.name), size=5)
            for part, height, like in _placed(plain, error[own], reach):
                also = [f"{value:+.2f} % from the law" for value in error[own][part]]
                series += scene.dots(like, rows[own][part], "at", height, also)
        dark = dark or len(shading) > 1
        for split, marker, label in held[law.name]:
            series += _held_series(scene, split, marker, label, against, reach)
        bands = (Band(x.limits, (-2 * sd,) * 2, (2 * sd,) * 2, GREY, "band"),) if sd else ()
        panels.append(Panel(wording.architecture(law.name), x, y, tuple(series), bands))
    caption = f"Residuals of the fit in log loss against {against}. Line: the law."
    if dark:
        caption += f" Darker: {'longer budgets' if against == 'size' else 'larger models'}."
    if known:
        caption += " Band: two robust standard deviations to either side."
    if any(held.values()):
        caption += " Hollow: points held out once, against the law fitted without them."
    if furthest > reach:
        caption += " Triangles at the edge: points further out than the axis."
    return Figure(
        name=name,
        title=f"Errors of the law against {against}",
        caption=caption + scene.told,
        panels=tuple(panels),
        columns=scene.columns,
        inches=(scene.inches[0], 0.8 * scene.inches[1]),
    )


def _placed(plain: Series, error: Array, reach: float) -> list[tuple[NDArray[np.bool_], Array, Series]]:
    """Return the points inside the axis, above and below it: which they are, their heights and their looks."""
    inside = np.abs(error) <= reach
    found = [(inside, error[inside], plain)]
    for sign, triangle in ((1.0, UP), (-1.0, DOWN)):
        out = sign * error > reach
        edge = replace(plain, marker=triangle, size=8.0, fills=plain.fills or ("white",))
        found.append((out, np.full(int(out.sum()), sign * EDGE * reach), edge))
    return [one for one in found if one[0].any()]


def _held(scene: Scene, name: str, against: str) -> list[tuple[HeldOutSplit, Marker, str]]:
    """Return the held-out splits of an architecture with marker and label; none against compute, which they lack."""
    heldout = scene.document.architectures[name].heldout
    splits: tuple[tuple[HeldOutSplit | None, Marker, str], ...] = (
        (heldout.largest_size, "diamond", "held out: largest sizes"),
        (heldout.longest_budget, "square", "held out: longest budgets"),
    )
    if against == "compute":
        return []
    return [(split, marker, label) for split, marker, label in splits if split is not None]


def _held_series(
    scene: Scene, split: HeldOutSplit, marker: Marker, label: str, against: str, reach: float
) -> list[Series]:
    column = "n_params" if against == "size" else scene.unit
    x = np.array([getattr(point, column) for point in split.points], dtype=float)
    error = _errors_of(split)
    plain = Series((), (), INK, label, label, marker=marker, size=7, fills=("none",))
    found = []
    for part, height, like in _placed(plain, error, reach):
        places = np.flatnonzero(part)

        def tell(some: list[int], places: NDArray[np.intp] = places) -> Told:
            told = [(split.points[place].run_id, error[place]) for place in places[some]]
            return tuple(f"{run}\n{label}\n{value:+.2f} % from the law" for run, value in told), ()

        found += scene.split(like, x[part], height, tell)
    return found


def _errors_of(split: HeldOutSplit) -> Array:
    loss, predicted = (
        np.array([getattr(one, name) for one in split.points]) for name in ("loss", "predicted")
    )
    return _percent(loss, predicted)


def _percent(loss: Array, predicted: Array) -> Array:
    out: Array = 100 * np.log(loss / predicted)
    return out
