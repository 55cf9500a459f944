"""The controller gives up on Series that other processes train, and trains Runs that are retried meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.dispatch import supervise
from harness.dispatch.arrays import Array, new_array
from harness.dispatch.base import Handle, Task
from harness.dispatch.ray.controller import OTHERS_SECONDS, train_tasks
from harness.record.control import Control
from harness.record.jobs import JobState
from harness.record.journal import Event, read_progress
from harness.record.registry import ResolvedStudy
from harness.record.root import Root, read_run, write_run, write_series
from harness.submit.cancel import reset_attempts
from harness.submit.monitor import rows_of
from harness.train.stopping import StopFlag
from tests.harness.dispatch.fakes import SMALL, FakeBackend
from tests.harness.journals import begin_run, finish, registered
from tests.studies import Fields, with_iterations


def array_of(study: ResolvedStudy) -> Array:
    """Make a packed array with a task for each Run."""
    tasks = [
        Task(series_id=point.series_id, run_dirs=(write_run(study.root, point.run),))
        for point in study.points
    ]
    return new_array("ssmscale-packed", SMALL, tasks, packed=True)


def test_devices_are_not_held_for_series_that_others_train(
    tmp_path: Path, study_fields: Fields, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = registered(Root(tmp_path / "runs"), study_fields)
    folder = study.root.study("tiny")
    now, asked = [0.0], set[Handle]()

    def pass_time(seconds: float = 0.1) -> float:
        now[0] += seconds
        assert now[0] < 3 * OTHERS_SECONDS
        return now[0]

    def found_busy(handle: Handle) -> JobState:
        """Call a job running at first: its ranks need a moment to find that another process trains the Series."""
        state = JobState.BUSY if handle in asked else JobState.RUNNING
        asked.add(handle)
        return state

    monkeypatch.setattr(supervise.time, "monotonic", pass_time)
    monkeypatch.setattr(supervise.time, "sleep", pass_time)
    monkeypatch.setattr(supervise, "LOOK_SECONDS", 0.0)
    assert train_tasks(array_of(study), folder, FakeBackend(folder, found_busy), StopFlag()) == 0
    assert now[0] > OTHERS_SECONDS


def test_a_run_that_joins_a_series_which_is_over_is_trained_before_the_controller_ends(
    tmp_path: Path, study_fields: Fields
) -> None:
    study_fields["grid"]["iterations"] = [5]
    study = registered(Root(tmp_path / "runs"), study_fields)
    array, folder = array_of(study), study.root.study("tiny")
    (task,) = array.tasks
    write_series(study.root, study.points[0].run)
    others = {**with_iterations(study_fields, 10), "name": "other"}
    (late,) = registered(study.root, others).points
    trained: list[Path] = []

    def finished(handle: Handle) -> JobState:
        """Finish the Runs that are left, as a worker does; a Run joins when its last look is over."""
        for folder in handle.task.left(study.root.control("tiny")):
            finish(begin_run(study.root, read_run(folder)), read_run(folder))
            trained.append(folder)
        if len(trained) == 1:
            write_run(study.root, late.run)
            with task.work().locked():
                task.work().add("other", [late.run_id], array.name)
        return JobState.ENDED

    assert train_tasks(array, folder, FakeBackend(folder, finished), StopFlag()) == 0
    assert trained == [*task.run_dirs, study.root.run(late.run_id)]
    assert task.work().is_over(array.name)


@pytest.mark.parametrize("how", ["failed", "cancelled"])
def test_a_run_that_is_retried_while_others_train_is_trained_too(
    tmp_path: Path, study_fields: Fields, how: str
) -> None:
    study_fields["grid"] |= {"iterations": [10], "seeds": [0, 1]}
    study = registered(Root(tmp_path / "runs"), study_fields)
    for point in study.points:
        write_series(study.root, point.run)
    wanted, given_up = study.points
    folder = study.root.study("tiny")
    if how == "cancelled":
        Control(folder / "control.jsonl").append("cancelled", runs=[given_up.run_id])
    else:
        with begin_run(study.root, given_up.run) as journal:
            journal.append(Event.FAILED, reason="its loss is not a number", kind="diverged")
    trained: list[str] = []

    def finished(handle: Handle) -> JobState:
        """Finish the Runs of a job at once; while the first one trains the user retries all."""
        if not trained:
            reset_attempts(study.root, "tiny", rows_of(study))
        for run in map(read_run, handle.task.run_dirs):
            finish(begin_run(study.root, run), run)
        trained.append(handle.task.series_id)
        return JobState.ENDED

    assert train_tasks(array_of(study), folder, FakeBackend(folder, finished), StopFlag()) == 0
    assert trained == [wanted.series_id, given_up.series_id]
    assert {read_progress(study.root.run(point.run_id)).state for point in study.points} == {Event.FINISHED}
