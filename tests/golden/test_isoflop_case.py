"""An IsoFLOP campaign as people run them, with a right answer of its own: the exponents of its README's laws."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.findings.isoflop import optimal_sizes
from analysis.points.table import check_points, read_table
from tests.analysis.conftest import joined, noisy


@pytest.mark.parametrize("columns", [["flops"], []], ids=["own FLOPs", "6ND"])
def test_the_exponents_of_a_campaign_that_misses_its_budgets(
    cases: Path, tmp_path: Path, columns: list[str]
) -> None:
    right = json.loads((cases / "right.json").read_text())["isoflop.csv"]
    table = pd.read_csv(cases / "isoflop.csv")
    table.drop(columns=["flops"] if not columns else []).to_csv(tmp_path / "points.csv", index=False)
    for name, one in joined(check_points(read_table(tmp_path / "points.csv", {}))).items():
        found = optimal_sizes(one.curve, noisy({one.fit.architecture: one}, 100)[one.fit.architecture])
        assert found.method == "equal_flops"
        assert [optimum.sizes for optimum in found.optima] == [9] * 5
        for method in ("isoflop", "corrected", "parametric"):
            exponent = found.exponents[method]
            assert exponent.value == pytest.approx(right["exponent_of_n_by_6nd"][name], abs=right["within"])
            assert exponent.ci95 is not None


def test_a_table_without_budgets_is_interpolated_and_keeps_to_its_sizes(golden: Path, tmp_path: Path) -> None:
    table = pd.read_csv(golden / "kyo_takano" / "df.csv")
    table = table.rename(columns={"C": "flops", "N": "n_params", "D": "tokens"}).assign(architecture="x")
    table.to_csv(tmp_path / "points.csv", index=False)
    one = joined(check_points(read_table(tmp_path / "points.csv", {})))["x"]
    found = optimal_sizes(one.curve, noisy({one.fit.architecture: one}, 200)[one.fit.architecture])
    assert found.method == "interpolated"
    assert [optimum.reasons for optimum in found.optima]
    for optimum in found.optima:
        for size in (optimum.isoflop, optimum.corrected, optimum.envelope):
            assert size is None or table["n_params"].min() <= size <= table["n_params"].max()
        assert optimum.parametric is None or optimum.parametric <= 10 * table["n_params"].max()
    assert np.isfinite([exponent.value for exponent in found.exponents.values()]).all()
