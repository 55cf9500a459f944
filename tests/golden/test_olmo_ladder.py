"""OLMo's model ladder: the published extrapolation to 13B parameters, and how far it misses (arXiv 2412.04403)."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from analysis.fitting.solver import Problem, fit_law
from analysis.laws.catalogue import CHINCHILLA


def test_the_ladder_predicts_the_published_loss_of_13b(golden: Path) -> None:
    with (golden / "olmo_ladder" / "c4_ladder_points.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))

    def table(train: bool) -> tuple[np.ndarray, np.ndarray]:
        own = [row for row in rows if (row["mode"] == "train") == train]
        x = np.array([[float(row["params"]), float(row["tokens"])] for row in own])
        return x, np.array([float(row["c4_loss_mean_last5"]) for row in own])

    x, loss = table(train=True)
    problem = Problem.of(CHINCHILLA, x, loss, 1e-3)
    result = fit_law(problem)
    assert result.objective == pytest.approx(3.29985720e-5, rel=1e-6)
    targets, actual = table(train=False)
    predicted = CHINCHILLA.predict(result.u[None], CHINCHILLA.centred(targets, problem.centre))[0]
    largest = int(np.argmax(targets[:, 0]))
    assert predicted[largest] == pytest.approx(2.344387, abs=1e-5)
    assert predicted[largest] / actual[largest] - 1 == pytest.approx(-0.0383, abs=1e-4)
    inside = CHINCHILLA.predict(result.u[None], problem.z)[0] / loss - 1
    assert np.abs(inside).mean() == pytest.approx(0.00247307, abs=1e-6)
