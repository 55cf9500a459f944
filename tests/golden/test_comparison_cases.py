"""Size ratios of small tables with right answers: what the runs support, and what their losses say without a law."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.findings.comparison import FittedArchitecture
from analysis.findings.curve import Rung
from analysis.findings.equal_loss import SizeRatio, compare_at
from analysis.findings.local_curves import ModelFree, model_free
from analysis.points.table import check_points, read_table
from tests.analysis.conftest import joined

REFERENCE, ARM = "transformer", "ssm"


def fitted(cases: Path, name: str) -> dict[str, FittedArchitecture]:
    return joined(check_points(read_table(cases / name)), 200)


def compared(
    fits: dict[str, FittedArchitecture], n_params: float, tokens: float
) -> tuple[SizeRatio, ModelFree]:
    curves = {name: one.curve for name, one in fits.items()}
    found = compare_at(curves, REFERENCE, Rung(n_params, None, tokens))[ARM]
    (free,) = model_free(curves, REFERENCE, [found], 0)
    return found.ratio, free


def right(cases: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((cases / "right.json").read_text())[name]
    return found


def test_an_isoflop_campaign_supports_its_bands_and_not_the_largest_size_at_the_most_tokens(
    cases: Path,
) -> None:
    fits = fitted(cases, "isoflop.csv")
    frame = fits[REFERENCE].curve.frame
    row, free = compared(fits, float(frame["n_params"].max()), float(frame["tokens"].max()))
    assert (row.status, row.ratio, free.ratio) == ("extrapolated", None, None)
    assert "times the largest trained compute" in row.reason
    for inside in right(cases, "isoflop.csv")["size_ratio_inside"]:
        row, free = compared(fits, inside["n_ref"], inside["tokens"])
        assert (row.status, free.status) == ("identified", "identified")
        assert row.ratio == pytest.approx(inside["ratio"], rel=0.03)
        assert free.ratio == pytest.approx(inside["ratio"], rel=0.05)


@pytest.mark.parametrize("name", ["diverged.csv", "coupled.csv"])
def test_the_losses_give_the_right_ratio_with_diverged_runs_and_without_an_additive_law(
    cases: Path, name: str
) -> None:
    at = right(cases, name)["size_ratio_at"]
    _, free = compared(fitted(cases, name), at["n_ref"], at["tokens"])
    assert free.ci95 is not None
    low, high = free.ci95
    assert low is not None
    assert high is not None
    assert low < at["ratio"] < high
    assert np.log(high / low) < 0.4
