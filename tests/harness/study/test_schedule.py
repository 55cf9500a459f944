"""The learning rate is a pure function, the same for every Run of a Series up to its branch step."""

from itertools import pairwise

import pytest

from harness.study.run import (
    Schedule,
    ScheduleKind,
    branch_step,
    fewest_iterations,
    is_annealed,
    learning_rate,
    steps_before_decay,
    trunk_learning_rate,
)

WSD = Schedule(warmup=10)


def test_runs_of_every_length_have_the_trunks_learning_rate_until_they_branch() -> None:
    assert branch_step(WSD, 100) == 80
    for iterations in (50, 100, 1000):
        for step in range(branch_step(WSD, iterations)):
            assert learning_rate(WSD, 1e-3, step, iterations) == trunk_learning_rate(WSD, 1e-3, step)


def test_the_rate_rises_to_the_peak_in_the_warmups_steps_and_falls_at_every_step_of_the_decay() -> None:
    rates = [learning_rate(WSD, 1e-3, step, 1000) for step in range(1000)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[9] == rates[10] == rates[799] == 1e-3
    assert all(later < earlier for earlier, later in pairwise(rates[799:]))


@pytest.mark.parametrize(
    ("kind", "last", "branch"), [("wsd", 5e-6, 80), ("cosine", 5e-6, 0), ("constant", 1e-3, 0)]
)
def test_all_but_a_constant_schedule_anneal_to_the_final_fraction(
    kind: str, last: float, branch: int
) -> None:
    schedule = Schedule(kind=ScheduleKind(kind), warmup=10, final_fraction=0.005)
    assert learning_rate(schedule, 1e-3, 99, 100) == pytest.approx(last)
    assert branch_step(schedule, 100) == branch
    assert is_annealed(schedule) is (last < 1e-3)


@pytest.mark.parametrize("kind", list(ScheduleKind))
@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("warmup", [0, 1, 7, 500])
def test_the_shortest_run_is_the_first_whose_warmup_ends_before_its_decay(
    kind: ScheduleKind, fraction: float, warmup: int
) -> None:
    schedule = Schedule(kind=kind, warmup=warmup, decay_fraction=fraction)
    shortest = fewest_iterations(schedule)
    assert steps_before_decay(schedule, shortest) >= warmup
    assert all(steps_before_decay(schedule, fewer) < warmup for fewer in range(1, shortest))
