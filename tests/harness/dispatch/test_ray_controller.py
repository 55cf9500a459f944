"""How long a controller goes on with Series that it cannot have, and what it takes up that is forgiven meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from harness.common.process import identify_process
from harness.dispatch import supervise
from harness.dispatch.arrays import Array
from harness.dispatch.base import Backend, Handle, Task
from harness.dispatch.ray.controller import OTHERS_SECONDS, train_tasks
from harness.plan.allocation import Shape
from harness.record.control import Control
from harness.record.jobs import JobState, JobView
from harness.record.journal import Event, read_progress
from harness.record.registry import ResolvedStudy
from harness.record.root import Root, read_run, write_run, write_series
from harness.submit.cancel import reset_attempts
from harness.submit.monitor import rows_of
from harness.train.stopping import StopFlag
from tests.harness.journals import begin_run, finish, registered

Fields = dict[str, Any]


class Taken(Backend):
    """Ranks that find every Series in other hands, each time after they have been asked how it goes."""

    name = "fake"

    def __init__(self, pass_by: Callable[[float], None]) -> None:
        self.pass_by = pass_by
        self.asked: dict[Handle, int] = {}

    def submit(self, tasks: Sequence[Task], name: str = "") -> list[Handle]:
        handles = [Handle(task, f"{len(self.asked)}") for task in tasks]
        self.asked |= dict.fromkeys(handles, 0)
        return handles

    def views(self, handles: Sequence[Handle]) -> Mapping[str, JobView]:
        self.pass_by(0.5)
        for handle in handles:
            self.asked[handle] += 1
        states = {handle: JobState.BUSY if self.asked[handle] > 1 else JobState.RUNNING for handle in handles}
        return {handle.job_id: handle.view(states[handle]) for handle in handles}

    def cancel(self, handles: Sequence[Handle]) -> None:
        raise AssertionError(handles)

    def logs(self, handle: Handle) -> list[Path]:
        raise AssertionError(handle)

    def close(self) -> None:
        pass


class Finishing(Backend):
    """A dispatcher whose workers finish at once whatever they are given; the user retries all while the first works."""

    name = "fake"

    def __init__(self, study: ResolvedStudy) -> None:
        self.study, self.trained = study, list[str]()

    def submit(self, tasks: Sequence[Task], name: str = "") -> list[Handle]:
        return [Handle(task, "0") for task in tasks]

    def views(self, handles: Sequence[Handle]) -> Mapping[str, JobView]:
        if handles and not self.trained:
            reset_attempts(self.study.root, self.study.study.name, rows_of(self.study))
        for handle in handles:
            for folder in handle.task.run_dirs:
                finish(begin_run(self.study.root, read_run(folder)), read_run(folder))
            self.trained.append(handle.task.series_id)
        return {handle.job_id: handle.view(JobState.ENDED) for handle in handles}

    def cancel(self, handles: Sequence[Handle]) -> None:
        raise AssertionError

    def logs(self, handle: Handle) -> list[Path]:
        return []

    def close(self) -> None:
        return


def array_of(study: ResolvedStudy) -> Array:
    """A packed array of a task for each Run."""
    return Array(
        name="ssmscale-packed",
        shape=Shape(nodes=1, ranks=1, threads=1, memory_gib=1),
        tasks=tuple(
            Task(series_id=point.series_id, run_dirs=(write_run(study.root, point.run),))
            for point in study.points
        ),
        packed=True,
        process=identify_process(),
        t=time.time(),
    )


def test_devices_are_not_held_for_series_that_others_train(
    tmp_path: Path, study_fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Root(tmp_path / "runs")
    study = registered(root, study_fields)
    array = array_of(study)
    now = [0.0]

    def pass_by(seconds: float) -> None:
        now[0] += seconds
        assert now[0] < 3 * OTHERS_SECONDS

    monkeypatch.setattr(supervise.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(supervise.time, "sleep", pass_by)
    monkeypatch.setattr(supervise, "LOOK_SECONDS", 0.0)
    assert train_tasks(array, root.study("tiny"), Taken(pass_by), StopFlag()) == 0
    assert now[0] > OTHERS_SECONDS


@pytest.mark.parametrize("how", ["failed", "cancelled"])
def test_what_is_retried_while_others_are_trained_is_trained_too(
    tmp_path: Path, study_fields: Fields, how: str
) -> None:
    study_fields["grid"] |= {"iterations": [10], "seeds": [0, 1]}
    study = registered(Root(tmp_path / "runs"), study_fields)
    for point in study.points:
        write_series(study.root, point.run)
    wanted, given_up = study.points
    folder = study.root.study("tiny")
    control = Control(folder / "control.jsonl")
    if how == "cancelled":
        control.append("cancelled", runs=[given_up.run_id])
    else:
        with begin_run(study.root, given_up.run) as journal:
            journal.append(Event.FAILED, reason="its loss is not a number", kind="diverged")
    array = array_of(study)
    dispatcher = Finishing(study)
    assert train_tasks(array, folder, dispatcher, StopFlag()) == 0
    assert dispatcher.trained == [wanted.series_id, given_up.series_id]
    assert {read_progress(study.root.run(point.run_id)).state for point in study.points} == {Event.FINISHED}
