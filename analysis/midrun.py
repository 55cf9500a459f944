"""Points taken mid-run against a law of annealed ones, or the other way about: compared, and never in one fit."""

from __future__ import annotations

import numpy as np

from analysis.compare import Curve
from analysis.points import CheckedPoints
from analysis.results import OtherPoints


def other_points(curve: Curve, points: CheckedPoints) -> OtherPoints | None:
    """The other kind's points within the fitted range, against this architecture's law; None where there are none."""
    architecture = str(curve.frame["architecture"].iloc[0])
    rows = points.others[points.others["architecture"] == architecture]
    for column in curve.law.inputs:
        seen = curve.frame[column]
        rows = rows[(rows[column] >= seen.min()) & (rows[column] <= seen.max())]
    if rows.empty:
        return None
    z = np.log(rows[list(curve.law.inputs)].to_numpy(dtype=np.float64))
    fitted = curve.law.predict(curve.params[:1], z)[0]
    return OtherPoints(
        kind="unannealed" if points.annealed else "annealed",
        points=len(rows),
        mean_relative_difference=float(np.mean(rows["loss"].to_numpy(dtype=np.float64) / fitted - 1.0)),
    )
