"""Laws in which size and data act together: they contain the additive law, and find what made the points."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from analysis.findings.comparison import fit_all
from analysis.findings.curve import Curve, data_at, size_at
from analysis.fitting.solver import Problem, fit_law, limits, objective_at
from analysis.laws.catalogue import CHINCHILLA, COUPLED, MOVING, law_named
from analysis.laws.law import Array, Law
from analysis.report.headlines import law_in_numbers
from tests.analysis.conftest import checked, fit
from tests.analysis.simulators import CAMPAIGNS, REFERENCE, TRANSFORMER

MORE = pytest.mark.parametrize("law", [COUPLED, MOVING], ids=lambda law: law.name)


def z_and_u() -> tuple[Array, Array]:
    rng = np.random.default_rng(3)
    z = rng.normal(0, 1.5, (40, 2))
    u = np.column_stack([rng.uniform(0.2, 2, (5, 3)), rng.uniform(0.1, 1, (5, 2))])
    return z, u


@MORE
def test_the_additive_law_is_a_special_case_to_rounding_with_its_derivatives(law: Law) -> None:
    z, u = z_and_u()
    same = law.lifted(u)[:, 0]
    loss, jacobian = CHINCHILLA.predict_with_jacobian(u, z)
    more, derivatives = law.predict_with_jacobian(same, z)
    np.testing.assert_allclose(more, loss, rtol=1e-14)
    np.testing.assert_allclose(derivatives[:, :, :5], jacobian, rtol=1e-13, atol=1e-300)


def test_a_term_that_is_zero_leaves_the_other() -> None:
    z, u = z_and_u()
    u[:, 1] = 0.0
    for gamma in (0.3, 1.0, 2.0):
        coupled = COUPLED.predict(np.column_stack([u, np.full(5, gamma)]), z)
        np.testing.assert_allclose(coupled, CHINCHILLA.predict(u, z), rtol=1e-9)


def test_the_coupled_law_is_its_formula_and_kaplans_with_gamma_beta_and_no_offset() -> None:
    E, A, B, alpha, beta, gamma = 1.7, 400.0, 2000.0, 0.34, 0.28, 0.6
    n, d = 1e9, 2e10
    (loss,) = COUPLED.predict(np.array([[E, A, B, alpha, beta, gamma]]), np.log([[n, d]]))[0]
    inner = A ** (1 / gamma) * n ** (-alpha / gamma) + B ** (1 / gamma) * d ** (-beta / gamma)
    assert loss == pytest.approx(E + inner**gamma, rel=1e-12)
    # Kaplan et al. 2020, equation 1.5, with the constants of table 2: ((Nc/N)^(alpha/beta) + Dc/D)^beta.
    kaplan = ((8.8e13 / n) ** (0.076 / 0.095) + 5.4e13 / d) ** 0.095
    u = np.array([[0.0, 8.8e13**0.076, 5.4e13**0.095, 0.076, 0.095, 0.095]])
    assert COUPLED.predict(u, np.log([[n, d]]))[0, 0] == pytest.approx(kaplan, rel=1e-12)
    own = law_named("kaplan").predict(u[:, 1:5], np.log([[n, d]]))
    assert own[0, 0] == pytest.approx(kaplan, rel=1e-12)


def test_kaplans_law_is_found_in_points_that_follow_it_and_reported() -> None:
    law = law_named("kaplan")
    n, d = (axis.ravel() for axis in np.meshgrid(np.geomspace(3e6, 1e9, 6), np.geomspace(5e8, 2e10, 6)))
    true = {"A": 8.8e13**0.076, "B": 5.4e13**0.095, "alpha": 0.076, "beta": 0.095}
    x = np.column_stack([n, d])
    loss = law.predict(np.array([list(true.values())]), np.log(x))[0]
    result = fit_law(Problem.of(law, x, loss, 1e-3))
    assert result.status == "converged"
    assert result.params == pytest.approx(true, rel=1e-3)
    document = fit(CAMPAIGNS["one_seed"].table(0), law="kaplan", resamples=100, reference=REFERENCE)
    assert set(document.architectures[REFERENCE].ci95) == set(true)
    assert law_in_numbers(document, REFERENCE).startswith("L = ((A/N^α)^(1/β)")


@pytest.mark.parametrize("gamma", [0.5, 1.0, 1.6])
def test_the_coupling_that_made_the_points_is_found(gamma: float) -> None:
    n, d = (axis.ravel() for axis in np.meshgrid(np.geomspace(3e7, 1e9, 6), np.geomspace(5e8, 2e10, 6)))
    true = {"E": 2.3, "A": 420.0, "B": 1900.0, "alpha": 0.36, "beta": 0.37, "gamma": gamma}
    x = np.column_stack([n, d])
    loss = COUPLED.predict(np.array([list(true.values())]), np.log(x))[0]
    result = fit_law(Problem.of(COUPLED, x, loss, 1e-3))
    assert result.status == "converged"
    assert result.params == pytest.approx(true, rel=1e-3)


@MORE
def test_no_other_optimiser_finds_a_lower_objective(law: Law) -> None:
    points = checked(CAMPAIGNS["coupled"].table(0))
    problem = Problem.of(law, law.x(points.of(REFERENCE)), points.of(REFERENCE)["loss"].to_numpy(), 1e-2)
    result = fit_law(problem)
    low, high = limits(problem)
    rng = np.random.default_rng(0)

    def objective(u: Array) -> float:
        return float(objective_at(problem, np.clip(u, low, high)[None], *problem.copies(1))[0])

    for _ in range(3):
        start = np.clip(
            result.u + rng.normal(0, 0.3, len(low)) * np.maximum(np.abs(result.u), 0.05), low, high
        )
        found = minimize(objective, start, method="Nelder-Mead", options={"maxiter": 3000, "fatol": 1e-13})
        assert result.objective <= found.fun * (1 + 1e-6)


def test_a_law_whose_exponent_moves_is_solved_where_it_falls() -> None:
    """Far beyond the points its exponent changes sign, and the loss rises: the size near the points counts."""
    points = checked(CAMPAIGNS["coupled"].table(0))
    (fit, *_) = fit_all(points.frames, MOVING, 1e-3)
    params = np.array([list(fit.result.params.values())])
    curve = Curve(MOVING, params, points.of(fit.architecture))
    assert curve.loss(1e18, 1.6e10)[0] > curve.loss(1e9, 1.6e10)[0]
    for size, data in ((3e8, 1.6e10), (1e8, 1e9)):
        loss = curve.loss(size, data)
        assert size_at(curve, loss, data)[0] == pytest.approx(size, rel=1e-6)
        assert data_at(curve, loss, size)[0] == pytest.approx(data, rel=1e-6)
    assert size_at(curve, np.array([1e-3]), 1e9)[0] == np.inf


def test_the_truth_of_a_coupled_campaign_lies_in_the_fitted_law() -> None:
    points = checked(CAMPAIGNS["coupled"].table(2))
    fits = {fit.architecture: fit for fit in fit_all(points.frames, law_named("coupled"), 1e-3)}
    assert fits[REFERENCE].result.params["gamma"] == pytest.approx(0.5, abs=0.05)
    far = COUPLED.predict(np.array([list(fits[REFERENCE].result.params.values())]), np.log([[4e9, 1.6e10]]))[
        0, 0
    ]
    truth = (
        TRANSFORMER.E
        + ((TRANSFORMER.loss(4e9, 1e99) - TRANSFORMER.E) ** 2 + (1900.0 / 1.6e10**0.37) ** 2) ** 0.5
    )
    assert far == pytest.approx(truth, rel=0.005)
