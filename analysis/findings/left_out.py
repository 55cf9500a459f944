"""Points left out of a fit and predicted by the fit of the rest, as a fit document shows them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from analysis.findings.results import HeldOut, HeldOutPoint, HeldOutSplit
from analysis.fitting.bootstrap import Fitted
from analysis.fitting.held_out import Split, held_out, held_out_compute
from analysis.points.checks import compute_of

if TYPE_CHECKING:
    import pandas as pd

SHOWN = ("run_id", "n_params", "tokens", "iterations", "loss")

Splits = Mapping[str, Split | None]
"""Splits of one architecture by what is left out: size, data, compute."""


def splits_of(fit: Fitted, frame: pd.DataFrame) -> dict[str, Split | None]:
    """Leave out the top of each axis of the law, and of the compute, and predict it from the rest."""
    law, joint = fit.problem.law, fit.joint
    x, loss = law.x(frame), frame["loss"].to_numpy(dtype=np.float64)
    others = joint.parts[: fit.part] + joint.parts[fit.part + 1 :] if joint else ()
    delta = fit.problem.delta
    found = {str(law.inputs[j].axis): held_out(law, x, loss, delta, j, others) for j in law.axes}
    if len(found) < 2:
        return found
    _, compute = compute_of(frame)
    if not np.isfinite(compute).all():
        return found
    return found | {"compute": held_out_compute(law, x, loss, delta, compute, others)}


def heldout_of(fit: Fitted, frame: pd.DataFrame, splits: Splits) -> HeldOut:
    """Return the errors of an architecture's points left out, beside the in-sample one."""
    law = fit.problem.law
    columns = {
        "size": law.size.column if law.size else "",
        "data": law.data.column if law.data else "",
        "compute": compute_of(frame)[0] if "compute" in splits else "",
    }
    shown = {what: _shown(splits.get(what), frame, column) for what, column in columns.items()}
    return HeldOut(
        in_sample_rms=in_sample_rms(fit),
        largest_size=shown["size"],
        longest_budget=shown["data"],
        largest_compute=shown["compute"],
    )


def in_sample_rms(fit: Fitted) -> float:
    """Return the root mean square of the fit's relative errors."""
    return float(np.sqrt(np.mean((np.exp(-fit.residual) - 1.0) ** 2)))


def _shown(split: Split | None, frame: pd.DataFrame, column: str) -> HeldOutSplit | None:
    if split is None:
        return None
    rows = frame.loc[split.left_out, list(SHOWN)].assign(
        iterations=lambda rows: rows["iterations"].astype(object).where(rows["iterations"].notna(), None),
        predicted=split.predicted,
        relative_error=split.relative_error,
    )
    return HeldOutSplit(
        column=column,
        threshold=split.threshold,
        status=split.status,
        determined=split.determined,
        mean_relative_error=float(split.relative_error.mean()),
        rms_relative_error=float(np.sqrt(np.mean(split.relative_error**2))),
        points=tuple(HeldOutPoint.model_validate(row) for row in rows.to_dict("records")),
    )
