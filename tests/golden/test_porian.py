"""Compute-optimal exponents under five FLOP and parameter conventions, .84 to .50 (Porian et al., arXiv 2406.19146)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.findings.exponents import power_law
from analysis.points.table import check_points, read_table
from tests.analysis.findings.test_isoflop import found_in

KEY = ["dataset", "hparams", "warmup", "decay", "param_count", "eval_loss"]
RUNS = pytest.mark.parametrize("number", range(10))


def published(golden: Path, number: int) -> pd.Series:
    return pd.read_csv(golden / "porian" / "published_fits.csv").iloc[number]


def rows_of(golden: Path, file: str, fit: pd.Series) -> pd.DataFrame:
    table = pd.read_csv(golden / "porian" / file)
    return table[(table[KEY] == fit[KEY].to_numpy()).all(axis=1)]


@RUNS
def test_each_published_exponent_is_the_weighted_regression_of_its_pairs(golden: Path, number: int) -> None:
    fit = published(golden, number)
    pairs = rows_of(golden, "optimal_pairs.csv", fit).dropna(subset=["n_star", "n_star_logstd"])
    flops, size = pairs["flops"].to_numpy(), pairs["n_star"].to_numpy()
    exponent, _ = power_law(flops, size, pairs["n_star_logstd"].to_numpy())
    assert exponent == pytest.approx(fit["n_exponent_weighted"], abs=5e-7)
    assert power_law(flops, size)[0] == pytest.approx(fit["n_exponent_basic"], abs=5e-7)


@RUNS
def test_our_own_isoflop_estimate_from_the_points_comes_close_to_each(
    golden: Path, number: int, tmp_path: Path
) -> None:
    fit = published(golden, number)
    rows_of(golden, "isoflop_points.csv", fit).to_csv(tmp_path / "points.csv", index=False)
    columns = {"architecture": "dataset", "n_params": "params"}
    found = found_in(check_points(read_table(tmp_path / "points.csv", columns)))
    assert found.method == "equal_flops"
    assert found.exponents["isoflop"].value == pytest.approx(fit["n_exponent_weighted"], abs=0.035)
    assert np.isfinite([one.value for one in found.exponents.values()]).all()
