"""Laws: their derivatives and their change of units."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from analysis.fitting.shared_e import joint_law, own_name
from analysis.laws.catalogue import LAWS, law_named
from analysis.laws.law import Law

EVERY = pytest.mark.parametrize("law", LAWS.values(), ids=lambda law: law.name)
SUMS = pytest.mark.parametrize(
    "law", [law for law in LAWS.values() if type(law).predict is Law.predict], ids=lambda law: law.name
)


def case(law: Law) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    x = np.exp(rng.uniform(11, 16, (7, len(law.inputs))))
    u = np.column_stack(
        [rng.uniform(0.5, 2, (3, len(law.linear))), rng.uniform(0.1, 1, (3, len(law.nonlinear)))]
    )
    return x, law.centre(x), u


def assert_central_differences(law: Law, u: np.ndarray, z: np.ndarray) -> None:
    _, jacobian = law.predict_with_jacobian(u, z)
    for j in range(u.shape[1]):
        step = np.zeros_like(u)
        step[:, j] = 1e-6
        slope = (law.predict(u + step, z) - law.predict(u - step, z)) / 2e-6
        np.testing.assert_allclose(jacobian[:, :, j], slope, rtol=1e-6, atol=1e-8)


@EVERY
def test_the_jacobian_equals_central_differences(law: Law) -> None:
    x, centre, u = case(law)
    z = law.centred(x, centre)
    np.testing.assert_allclose(law.predict_with_jacobian(u, z)[0], law.predict(u, z), rtol=1e-14)
    assert_central_differences(law, u, z)


@EVERY
def test_parameters_survive_the_change_of_units_and_predict_the_same(law: Law) -> None:
    x, centre, u = case(law)
    public = law.to_public(u, centre)
    np.testing.assert_allclose(law.to_solver(public, centre), u, rtol=1e-12)
    np.testing.assert_allclose(
        law.predict(public, np.log(x)), law.predict(u, law.centred(x, centre)), rtol=1e-10
    )


def test_chinchilla_is_its_formula() -> None:
    law = law_named("chinchilla")
    public = np.array([[1.7, 400.0, 2000.0, 0.34, 0.28]])
    loss = law.predict(public, np.log([[1e9, 2e10]]))[0, 0]
    assert loss == pytest.approx(1.7 + 400 / 1e9**0.34 + 2000 / 2e10**0.28, rel=1e-13)


@SUMS
def test_a_joint_laws_jacobian_equals_central_differences_and_each_part_is_its_own_law(law: Law) -> None:
    rng = np.random.default_rng(2)
    joint = joint_law(law, 3)
    which = np.array([0, 0, 1, 2, 2, 1])
    z = np.column_stack([rng.normal(size=(6, len(law.inputs))), which])
    u = rng.uniform(0.3, 1.5, (2, len(joint.names)))
    assert_central_differences(joint, u, z)
    loss = joint.predict(u, z)
    for part in range(3):
        own = [joint.names.index(own_name(replace(law, shared=("E",)), name, part)) for name in law.names]
        rows = which == part
        np.testing.assert_allclose(loss[:, rows], law.predict(u[:, own], z[rows, :-1]), rtol=1e-13)


def test_repeated_data_and_parameters_beyond_the_optimal_are_discounted_and_fresh_ones_not() -> None:
    """The values the authors' notebook prints for its own two allocations (arXiv 2305.16264)."""
    law = law_named("data_constrained")
    public = np.array(
        [[np.exp(0.6254804), np.exp(6.255414), np.exp(7.3049974), 0.3526596, 0.3526596, 15.387756, 5.309743]]
    )
    x = np.array([[6.34e9, 242e9, 25e9], [8.67e9, 178e9, 25e9], [1e9, 25e9, 25e9], [1e9, 25e9, 1e12]])
    loss = law.predict(public, np.log(x))[0]
    assert loss[:2] == pytest.approx([2.2256440889984477, 2.2269634075087867], rel=1e-14)
    E, A, B, alpha, beta = public[0, :5]
    fresh = E + A / 1e9**alpha + B / 25e9**beta  # 1e9 is below the size that is optimal for 25e9 tokens
    assert loss[2:] == pytest.approx([fresh, fresh], rel=1e-13)
