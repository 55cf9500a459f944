"""Laws: their derivatives and their change of units."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.errors import InputError
from analysis.laws import LAWS, Law, law_named

EVERY = pytest.mark.parametrize("law", LAWS.values(), ids=lambda law: law.name)


def case(law: Law) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    x = np.exp(rng.uniform(11, 16, (7, len(law.inputs))))
    u = np.column_stack(
        [rng.uniform(0.5, 2, (3, len(law.linear))), rng.uniform(0.1, 1, (3, len(law.nonlinear)))]
    )
    return x, np.log(x).mean(axis=0), u


@EVERY
def test_the_jacobian_equals_central_differences(law: Law) -> None:
    x, centre, u = case(law)
    z = law.centred(x, centre)
    loss, jacobian = law.predict_with_jacobian(u, z)
    np.testing.assert_allclose(loss, law.predict(u, z), rtol=1e-14)
    for j in range(u.shape[1]):
        step = np.zeros_like(u)
        step[:, j] = 1e-6
        slope = (law.predict(u + step, z) - law.predict(u - step, z)) / 2e-6
        np.testing.assert_allclose(jacobian[:, :, j], slope, rtol=1e-6, atol=1e-8)


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


def test_an_unknown_law_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"--law kaplan.*chinchilla"):
        law_named("kaplan")
