"""How what Series took corrects what others are expected to take."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.dispatch.base import Task
from harness.dispatch.packing.pace import Pace


def job(seconds: float, architecture: str = "simba") -> Task:
    return Task(series_id="s", run_dirs=(), seconds=seconds, architecture=architecture)


def test_a_plan_is_believed_until_something_has_finished() -> None:
    assert Pace().expected(job(40.0)) == 40.0


def test_one_series_counts_for_a_part_and_many_for_nearly_all() -> None:
    pace = Pace()
    pace.finished(job(10.0), 20.0)
    assert 1.2 < pace.factor("simba") < 1.9
    for _ in range(20):
        pace.finished(job(10.0), 20.0)
    assert pace.factor("simba") == pytest.approx(2.0, rel=0.05)


def test_an_architecture_that_none_has_finished_of_is_taken_to_be_like_the_others() -> None:
    pace = Pace()
    for _ in range(9):
        pace.finished(job(10.0, "simba"), 20.0)
    assert 1.2 < pace.factor("transformer") < pace.factor("simba")


def test_architectures_that_err_apart_are_corrected_apart() -> None:
    pace = Pace()
    for _ in range(9):
        pace.finished(job(10.0, "simba"), 20.0)
        pace.finished(job(10.0, "transformer"), 5.0)
    assert pace.expected(job(100.0, "simba")) == pytest.approx(200.0, rel=0.1)
    assert pace.expected(job(100.0, "transformer")) == pytest.approx(50.0, rel=0.1)


@given(st.lists(st.tuples(st.floats(0.0, 1e6), st.floats(0.0, 1e6)), max_size=5), st.floats(0.0, 1e6))
def test_what_is_expected_is_never_less_than_nothing(told: list[tuple[float, float]], elapsed: float) -> None:
    pace = Pace()
    for expected, measured in told:
        pace.finished(job(expected), measured)
    assert pace.expected(job(100.0)) > 0
    assert pace.left(job(100.0), elapsed) > 0


def test_a_plan_that_is_off_by_far_is_put_right_by_a_few_series() -> None:
    pace = Pace()
    for _ in range(4):
        pace.finished(job(0.2), 60.0)
    assert pace.expected(job(0.2)) > 15.0


def test_a_series_without_a_prediction_teaches_nothing() -> None:
    pace = Pace()
    pace.finished(job(0.0), 50.0)
    assert pace.factor("simba") == 1.0


def test_a_series_that_is_late_is_late_by_a_part_of_what_it_took() -> None:
    pace = Pace()
    assert pace.left(job(100.0), 60.0) == 40.0
    assert 20.0 < pace.left(job(100.0), 200.0) < 100.0
