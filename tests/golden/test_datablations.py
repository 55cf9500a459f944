"""Repeated data: the published fit recomputed, a lower optimum, and the valley it lies in (arXiv 2305.16264)."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from analysis.findings.notes import flat_profiles
from analysis.fitting.profile import profile
from analysis.fitting.solver import FitResult, Problem, fit_law, objective_at
from analysis.laws.catalogue import law_named

LAW = law_named("data_constrained")
COEFFICIENTS = {"E": 0.6254804, "A": 6.255414, "B": 7.3049974}
HELD = {name: float(np.exp(log)) for name, log in COEFFICIENTS.items()} | dict.fromkeys(
    ("alpha", "beta"), 0.3526596
)


@pytest.fixture(scope="module")
def problem(golden: Path) -> Problem:
    """Their 182 points, with all but the two R* held at the published values as they did."""
    with (golden / "datablations" / "datablations_c4_182.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 182
    x = np.array([[float(row[name]) for name in ("params", "tokens", "unique_tokens")] for row in rows])
    return Problem.of(LAW, x, np.array([float(row["val_loss"]) for row in rows]), 1e-3, held=HELD)


@pytest.fixture(scope="module")
def result(problem: Problem) -> FitResult:
    return fit_law(problem)


def at(problem: Problem, r_data: float, r_size: float) -> float:
    public = np.array([[*HELD.values(), r_data, r_size]])
    u = LAW.to_solver(public, problem.centre)
    return float(objective_at(problem, u, *problem.copies(1))[0])


def test_the_published_objective_recomputes_at_the_published_parameters(problem: Problem) -> None:
    assert at(problem, 15.387756, 5.309743) == pytest.approx(0.015825935258, abs=5e-13)


def test_the_published_optimum_is_a_local_one_and_a_lower_one_is_found(result: FitResult) -> None:
    assert result.status == "converged"
    assert result.objective <= 0.015804663
    assert result.params["R_D"] == pytest.approx(95.37, rel=2e-3)
    assert result.params["R_N"] == pytest.approx(1.706, rel=2e-3)
    assert {name: result.params[name] for name in HELD} == pytest.approx(HELD, rel=1e-12)


def test_the_valley_of_repetitions_is_reported_as_flat(problem: Problem, result: FitResult) -> None:
    curve = profile(problem, result, "R_D")
    pairs = zip(curve.values, curve.objective, strict=True)
    inside = [objective for value, objective in pairs if 14 < value < 300]
    assert len(inside) >= 10
    assert max(inside) <= result.objective * 1.0025
    (note,) = flat_profiles({"R_D": curve})
    assert note.code == "flat_profile"
    assert "R_D" in note.text
