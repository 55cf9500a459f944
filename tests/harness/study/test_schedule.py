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


def test_warmup_is_in_steps_and_rises_to_the_peak() -> None:
    rates = [learning_rate(WSD, 1e-3, step, 1000) for step in range(11)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[9] == rates[10] == 1e-3


@pytest.mark.parametrize("kind", [ScheduleKind.WSD, ScheduleKind.COSINE])
def test_the_last_step_is_taken_at_the_final_fraction(kind: ScheduleKind) -> None:
    schedule = Schedule(kind=kind, warmup=10, final_fraction=0.005)
    assert learning_rate(schedule, 1e-3, 99, 100) == pytest.approx(5e-6)
    assert is_annealed(schedule)


def test_a_constant_schedule_never_anneals_and_shares_no_trunk() -> None:
    schedule = Schedule(kind=ScheduleKind.CONSTANT, warmup=10)
    assert learning_rate(schedule, 1e-3, 99, 100) == 1e-3
    assert branch_step(schedule, 100) == 0
    assert not is_annealed(schedule)


def test_a_decay_falls_at_every_step() -> None:
    rates = [learning_rate(WSD, 1e-3, step, 100) for step in range(79, 100)]
    assert all(later < earlier for earlier, later in pairwise(rates))


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
