"""The Gemstones' published fits of L(N, D): same objective, or a lower one (arXiv 2502.06857)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from analysis.fitting.bootstrap import Fitted, cluster_keys, resample
from analysis.fitting.profile import profile
from analysis.fitting.solver import FitResult, Problem, fit_law, objective_at
from analysis.laws.catalogue import CHINCHILLA
from analysis.laws.law import Array

PREFIX = "approach_3_parameters_grid_search_0_"
SETS = (
    *("cool_begin", "cool_end", "cool_end_no_embeds", "hot"),
    *("hot_100b+", "hot_no_embeds", "lr_ablation_hot", "slim_chinchilla"),
)


def load(golden: Path, name: str) -> tuple[Array, Array, list[str]]:
    path = golden / "gemstones" / f"wandb_df_for_fitting_{name.removesuffix('_no_embeds')}.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    embeddings = 50304 if name.endswith("_no_embeds") else 0
    x = [[row["params_active_precise"] - embeddings * row.get("width", 0), row["tokens"]] for row in rows]
    loss = np.array([row["final_loss"] for row in rows])
    return np.array(x, dtype=float), loss, [row.get("run_name", "") for row in rows]


def published(golden: Path, name: str, power: int) -> tuple[dict[str, float], float]:
    path = golden / "gemstones" / f"parameters_delta-{power}" / f"{PREFIX}{name}.json"
    stored = {key: value["0"] for key, value in json.loads(path.read_text(encoding="utf-8")).items()}
    alpha, beta = stored["exponents"]
    a, b = stored["coefficients"]
    E = np.exp(stored["irreducible_error"])
    return {"E": E, "A": np.exp(a), "B": np.exp(b), "alpha": alpha, "beta": beta}, stored["loss"]


@pytest.fixture(scope="module")
def hot(golden: Path) -> tuple[Problem, FitResult]:
    x, loss, _ = load(golden, "hot")
    problem = Problem.of(CHINCHILLA, x, loss, 1e-3)
    return problem, fit_law(problem)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("power", [3, 4])
def test_published_objectives_recompute_at_the_published_parameters_and_none_is_lower(
    golden: Path, name: str, power: int
) -> None:
    x, loss, _ = load(golden, name)
    params, objective = published(golden, name, power)
    problem = Problem.of(CHINCHILLA, x, loss, 10.0**-power)
    result = fit_law(problem)
    u = CHINCHILLA.to_solver(np.array([[params[key] for key in CHINCHILLA.names]]), problem.centre)
    mine = objective_at(problem, u, *problem.copies(1))[0]
    assert mine == pytest.approx(objective, abs=6e-11)  # they print ten decimals
    assert result.status == "converged"
    assert result.objective <= objective * (1 + 1e-6)


def test_hot_points_give_the_published_law(golden: Path, hot: tuple[Problem, FitResult]) -> None:
    params, objective = published(golden, "hot", 3)
    _, result = hot
    assert result.objective == pytest.approx(objective, rel=1e-6)
    for name in ("alpha", "beta", "E"):
        assert result.params[name] == pytest.approx(params[name], rel=1e-3)


def test_every_profile_of_the_hot_points_closes_about_its_estimate(hot: tuple[Problem, FitResult]) -> None:
    problem, result = hot
    for name, estimate in result.params.items():
        low, high = profile(problem, result, name).interval
        assert low is not None, name
        assert high is not None, name
        assert low < estimate < high


def test_runs_resampled_spread_alpha_three_times_as_wide_as_rows(
    golden: Path, hot: tuple[Problem, FitResult]
) -> None:
    x, loss, runs = load(golden, "hot")
    problem, result = hot
    unknown = np.full(len(loss), np.nan)

    def spread(cluster: list[str]) -> float:
        index, keys = cluster_keys(x[:, 0], unknown, cluster)
        drawn = resample([Fitted("hot", problem, result, index, keys, x[:, 0])], 400, 0, "cluster")
        return float(drawn.params["hot"][:, 3].std())

    by_row, by_run = spread([str(i) for i in range(len(loss))]), spread(runs)
    assert by_row == pytest.approx(0.018, abs=0.004)
    assert by_run == pytest.approx(0.057, abs=0.012)
