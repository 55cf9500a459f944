"""The solver: it finds the law that made the points, and says how it ended."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize

from analysis.fitting import solver
from analysis.fitting.solver import Problem, fit_law, huber, limits, minimise, objective_at
from analysis.laws.catalogue import CHINCHILLA, SIZE_ALONE

TRUE = {"E": 1.9, "A": 80.0, "B": 900.0, "alpha": 0.31, "beta": 0.42}


def points(noise: float = 0.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    n, d = np.meshgrid(np.geomspace(1e5, 2e7, 5), np.geomspace(1e6, 1e8, 4))
    x = np.column_stack([n.ravel(), d.ravel()])
    loss = TRUE["E"] + TRUE["A"] / x[:, 0] ** TRUE["alpha"] + TRUE["B"] / x[:, 1] ** TRUE["beta"]
    return x, loss * np.exp(np.random.default_rng(seed).normal(0, noise, len(loss)))


def problem_of(delta: float = 1e-3, **options: Any) -> Problem:
    return Problem.of(CHINCHILLA, *points(**options), delta)


def test_points_without_noise_give_back_their_law() -> None:
    result = fit_law(problem_of())
    assert result.status == "converged"
    assert result.params == pytest.approx(TRUE, rel=1e-5)
    assert result.objective < 1e-15


@pytest.mark.parametrize("delta", [1e-1, 1e-3, 1e-4])
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.verify) for seed in (1, 2))])
def test_no_other_optimiser_finds_a_lower_objective(delta: float, seed: int) -> None:
    problem = problem_of(delta, noise=0.01, seed=seed)
    result = fit_law(problem)
    low, high = limits(problem)

    def objective(u: np.ndarray) -> float:
        return float(objective_at(problem, u[None], *problem.copies(1))[0])

    rng = np.random.default_rng(seed)
    for _ in range(4):
        start = np.clip(result.u * rng.uniform(0.6, 1.6, 5), low, high)
        other = minimize(objective, start, method="L-BFGS-B", bounds=list(zip(low, high, strict=True)))
        options = {"maxiter": 1500, "fatol": 1e-14}
        simplex = minimize(objective, other.x, method="Nelder-Mead", options=options)
        inside = bool(np.all((simplex.x >= low) & (simplex.x <= high)))
        assert result.objective <= (simplex.fun if inside else other.fun) * (1 + 1e-7)


def test_a_weight_of_two_is_a_point_seen_twice() -> None:
    x, loss = points(noise=0.01)
    weight = np.ones((1, len(loss)))
    weight[0, 3] = 2
    problem = Problem.of(CHINCHILLA, x, loss, 1e-3)
    start = fit_law(problem).u[None]
    weighted = minimise(problem, problem.y[None], weight, start, *limits(problem))
    repeated = fit_law(Problem.of(CHINCHILLA, np.vstack([x, x[3:4]]), np.append(loss, loss[3]), 1e-3))
    assert weighted.objective[0] == pytest.approx(repeated.objective, rel=1e-8)


def test_one_wild_point_hardly_moves_the_law() -> None:
    x, loss = points(noise=0.001)
    spoiled = loss.copy()
    spoiled[7] *= 1.5
    clean, robust = (fit_law(Problem.of(CHINCHILLA, x, y, 1e-3)) for y in (loss, spoiled))
    assert robust.params["alpha"] == pytest.approx(clean.params["alpha"], abs=0.02)
    least_squares = fit_law(Problem.of(CHINCHILLA, x, spoiled, 10.0))
    assert abs(least_squares.params["alpha"] - clean.params["alpha"]) > 0.05


def test_a_law_that_does_not_fall_ends_on_a_bound() -> None:
    x, loss = points()
    result = fit_law(Problem.of(CHINCHILLA, x, loss[::-1].copy(), 1e-3))
    assert result.status == "bound_hit"
    assert result.at_bound


def test_fewer_points_than_parameters_is_abnormal() -> None:
    x, loss = points()
    assert fit_law(Problem.of(CHINCHILLA, x[:4], loss[:4], 1e-3)).status == "abnormal"


def test_a_solver_cut_short_says_that_it_has_not_settled() -> None:
    problem = problem_of(noise=0.01)
    start = np.array([[0.1, 3.0, 3.0, 2.0, 2.0]])
    short = minimise(problem, *problem.copies(1), start, *limits(problem), max_iter=2)
    assert not short.settled[0]


def test_huber_is_quadratic_inside_delta_and_linear_outside() -> None:
    r = np.array([-0.002, -0.001, 0.0005, 0.01])
    np.testing.assert_allclose(huber(r, 1e-3), [1.5e-6, 5e-7, 1.25e-7, 9.5e-6], rtol=1e-12)


def test_the_law_of_size_alone_is_found() -> None:
    n = np.geomspace(1e5, 1e7, 6)
    result = fit_law(Problem.of(SIZE_ALONE, n[:, None], 2.0 + 30.0 / n**0.25, 1e-3))
    assert result.params == pytest.approx({"E": 2.0, "A": 30.0, "alpha": 0.25}, rel=1e-4)


def test_a_fit_that_starts_from_some_of_its_points_is_the_fit_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of(noise=0.01)
    whole = fit_law(problem)
    monkeypatch.setattr(solver, "MANY", 12)
    some = fit_law(problem)
    assert some.objective == pytest.approx(whole.objective, rel=1e-9)
    assert some.params == pytest.approx(whole.params, rel=1e-4)


def test_points_and_problems_are_taken_some_at_a_time_with_the_same_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem = problem_of(noise=0.01)
    whole = fit_law(problem)
    monkeypatch.setattr(solver, "SLICE", 3 * len(problem.y))
    np.testing.assert_array_equal(fit_law(problem).u, whole.u)
    monkeypatch.setattr(solver, "AT_ONCE", 7)
    np.testing.assert_allclose(fit_law(problem).u, whole.u, rtol=1e-6)
