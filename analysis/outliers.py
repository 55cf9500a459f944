"""Points that lie off their law by far more than the others do: always named, left out only on request.

Huber's loss keeps one such point from bending a law, so leaving it out seldom changes a curve; what it changes is the
reader's mind. The rule is stated with every row it hits.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from analysis.diagnostics import Note
from analysis.points import CheckedPoints, exclude

if TYPE_CHECKING:
    from collections.abc import Sequence

    from analysis.uncertainty import Fitted

FAR_OFF = 10.0
LEAST = 0.01
RULE = (
    f"more than {FAR_OFF:g} robust standard deviations (1.4826 times the median absolute residual of the log loss, "
    "less as many of the smallest as the law has parameters) "
    f"and more than {100 * LEAST:g} % off the law of its architecture"
)
MOST_NAMED = 5


def outliers(fit: Fitted) -> list[int]:
    """Rows of an architecture's frame (as CheckedPoints.of orders them) that lie off its law by that rule."""
    residual = np.abs(fit.residual)
    free = max(1, len(residual) - len(fit.problem.law.names))
    spread = 1.4826 * float(np.median(np.sort(residual)[-free:]))
    return [int(index) for index in np.flatnonzero((residual > FAR_OFF * spread) & (residual > LEAST))]


def outlier_notes(fit: Fitted, points: CheckedPoints) -> list[Note]:
    """One note that names an architecture's outliers, where they are in the fit."""
    found = points.of(fit.architecture).iloc[outliers(fit)]
    if found.empty:
        return []
    names = ", ".join(str(name) for name in found["run_id"][:MOST_NAMED])
    more = f" and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
    text = f"{len(found)} of {len(fit.problem.y)} points lie {RULE}: {names}{more}; --drop-outliers leaves them out."
    return [Note(code="outliers", text=text)]


def without_outliers(points: CheckedPoints, fits: Sequence[Fitted]) -> CheckedPoints:
    """The points less those that lie off these laws, each listed among the exclusions."""
    rows = {int(row) for fit in fits for row in points.of(fit.architecture)["row"].iloc[outliers(fit)]}
    hit = points.frame["row"].isin(rows)
    kept, excluded = exclude(points.frame, hit, "outlier", RULE)
    return replace(points, frame=kept.reset_index(drop=True), exclusions=(*points.exclusions, *excluded))
