"""At the same cost the proposed grid gives the size ratio a narrower interval than a log-even factorial one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from analysis.design.budget import Proposal, propose
from analysis.design.expect import ExpectedRatio, ratios_of
from analysis.design.grid import Grid, Rung, Space, sensitivity, spelled
from analysis.design.prior import Noise, Prior
from analysis.design.simulate import Draws, simulate, true_size_ratios
from analysis.errors import InputError
from analysis.laws.catalogue import law_named
from tests.analysis.synthetic import TOKENS_AN_ITERATION

REFERENCE = "cross_transformer"
SIZES = dict(zip("abcdef", np.geomspace(2e4, 6.4e5, 6).tolist(), strict=True))
SHAPE = {"E": 1.43, "A": 0.23 * 1.13e5**0.6, "B": 0.55 * 6.4e6**0.6, "alpha": 0.6, "beta": 0.6}
LAWS = {REFERENCE: SHAPE, "prefix_simba": SHAPE | {"A": SHAPE["A"] / 3**0.6}}
PRIOR = Prior(law_named("chinchilla"), LAWS, Noise(0.003, 0.004), "known")
FACTORIAL = (100, 200, 400, 800, 1600)


def hours(architecture: str, size: str, iterations: tuple[int, ...], seed: int) -> float:
    """GPU-hours in proportion to parameters and iterations: a trunk to the longest run's branch, and each decay."""
    return SIZES[size] * (0.8 * max(iterations) + 0.2 * sum(iterations)) * 1e-9


def space(counts: tuple[int, ...]) -> Space:
    rungs = tuple(Rung(name, size, n, TOKENS_AN_ITERATION) for size, n in SIZES.items() for name in LAWS)
    return Space(rungs, counts, hours)


def judged(grid: Grid, where: Space, studies: int, resamples: int) -> ExpectedRatio:
    """Return the size ratio of simulated studies on this grid that the search for a grid did not use."""
    found = simulate(grid.points(where), PRIOR, REFERENCE, Draws(studies, resamples, seed=9000))
    (ratio,) = ratios_of(found, REFERENCE)
    return ratio


def compared(
    where: Space, trials: int, studies: int, resamples: int
) -> tuple[Proposal, ExpectedRatio, float]:
    """Return the proposal for the factorial grid's cost, its ratio, and the share by which that is narrower."""
    factorial = Grid(FACTORIAL, (1,) * len(SIZES))
    cost = factorial.gpu_hours(where)
    found = propose(where, PRIOR, cost, draws=Draws(studies=trials))
    assert found.gpu_hours == pytest.approx(cost, rel=0.02)
    assert found.gpu_hours <= cost * (1 + 1e-9)
    even, best = (judged(grid, where, studies, resamples) for grid in (factorial, found.grid))
    print(f"{found.grid}\nfactorial {even}\nproposed {best}")
    return found, best, 1 - best.width / even.width


def test_the_proposed_grid_has_less_variance_than_a_factorial_one_of_the_same_cost() -> None:
    where = space(FACTORIAL)
    factorial = Grid(FACTORIAL, (1,) * len(SIZES))
    found = propose(where, PRIOR, factorial.gpu_hours(where), draws=Draws(studies=3))
    truth = true_size_ratios(found.grid.points(where), PRIOR, REFERENCE)
    proposed, even = (
        sensitivity(where, grid.iterations, PRIOR, truth, REFERENCE).variance(np.array([grid.seeds]))
        for grid in (found.grid, factorial)
    )
    assert proposed < even
    assert found.grid.iterations[-1] == FACTORIAL[-1]
    assert found.grid.seeds[-1] >= 1


@pytest.mark.verify
@pytest.mark.timeout(3600)
def test_the_proposed_grid_is_no_wider_over_a_hundred_studies() -> None:
    where = space((100, 200, 280, 400, 560, 800, 1600))
    _, best, gain = compared(where, trials=30, studies=100, resamples=300)
    assert gain >= 0.0
    assert best.coverage is not None
    assert best.coverage >= 0.85


def test_what_has_been_trained_costs_no_more_and_is_kept() -> None:
    def left(architecture: str, size: str, iterations: tuple[int, ...], seed: int) -> float:
        trained = (size, seed) in {("f", 0), ("f", 1), ("b", 0)}
        return 0.0 if trained else hours(architecture, size, iterations, seed)

    where = space(FACTORIAL[::2])
    cost = 1.2 * Grid(where.iterations, (1, 1, 0, 0, 0, 1)).gpu_hours(where)
    spaces = (where, replace(where, hours=left))
    whole, rest = (propose(one, PRIOR, cost, draws=Draws(studies=2)) for one in spaces)
    assert rest.grid.seeds[-1] >= 2 > whole.grid.seeds[-1]
    assert rest.gpu_hours <= cost * (1 + 1e-9) < rest.grid.gpu_hours(where)


def test_a_grid_is_spelled_as_a_study_writes_it() -> None:
    where = space(FACTORIAL)
    fields = spelled(where, Grid((100, 400, 1600), (3, 1, 0, 0, 3, 1)))
    assert fields == {
        "sizes": ["a", "b", "e", "f"],
        "iterations": [100, 400, 1600],
        "seeds": [0],
        "replicates": [{"sizes": ["a", "e"], "seeds": [1, 2]}],
    }


def test_a_budget_that_pays_for_nothing_says_what_would_be_enough() -> None:
    where = space(FACTORIAL)
    with pytest.raises(InputError, match=r"--budget 0.1: is too small for a grid.* GPU-hours") as refused:
        propose(where, PRIOR, 0.1)
    least = float(str(refused.value).split("takes ")[1].split()[0])
    cheapest = Grid((100, 200, 1600), (1, 1, 0, 0, 0, 1))
    assert least == pytest.approx(cheapest.gpu_hours(where), rel=1e-3)


def test_a_budget_and_a_study_that_do_not_serve_are_refused() -> None:
    where = space(FACTORIAL)
    for said, own, budget, reference in (
        ("above 0", where, 0.0, None),
        ("above 0", where, float("nan"), None),
        ("two architectures", replace(where, rungs=where.rungs[::2]), 10.0, None),
        ("--reference moon", where, 10.0, "moon"),
        ("2 sizes and 5 iteration counts", replace(where, rungs=where.rungs[:4]), 10.0, None),
    ):
        with pytest.raises(InputError, match=said):
            propose(own, PRIOR, budget, reference)
