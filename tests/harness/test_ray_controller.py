"""What the process that trains a packed array takes up while it runs: what is forgiven meanwhile too."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from harness import submission
from harness.control import Control
from harness.dispatch.base import Handle, Job, JobState
from harness.dispatch.slurm import Array, Shape, Task
from harness.journal import Event, read_progress
from harness.opening import rows_of
from harness.process import identify_process
from harness.ray_controller import train_tasks
from harness.rundir import Root, read_run, write_run, write_series
from harness.submission import ResolvedStudy
from harness.training.preemption import StopFlag
from tests.harness.journals import begin_run, finish, registered

Fields = dict[str, Any]


class Finishing:
    """A dispatcher whose workers finish at once whatever they are given; the user retries all while the first works."""

    def __init__(self, study: ResolvedStudy) -> None:
        self.study, self.trained = study, list[str]()

    def submit(self, jobs: Sequence[Job]) -> list[Handle]:
        return [Handle(job, "0") for job in jobs]

    def poll(self, handles: Sequence[Handle]) -> Mapping[Handle, JobState]:
        if handles and not self.trained:
            submission.forgive(self.study.root, self.study.study.name, rows_of(self.study))
        for handle in handles:
            for folder in handle.job.run_dirs:
                finish(begin_run(self.study.root, read_run(folder)), read_run(folder))
            self.trained.append(handle.job.series_id)
        return dict.fromkeys(handles, JobState.ENDED)

    def cancel(self, handles: Sequence[Handle]) -> None:
        raise AssertionError

    def log_paths(self, handle: Handle) -> list[Path]:
        return []

    def close(self) -> None:
        return


@pytest.mark.parametrize("how", ["failed", "cancelled"])
def test_what_is_retried_while_others_are_trained_is_trained_too(
    tmp_path: Path, study_fields: Fields, how: str
) -> None:
    study_fields["grid"] |= {"iterations": [10], "seeds": [0, 1]}
    study = registered(Root(tmp_path / "runs"), study_fields)
    for point in study.points:
        write_series(study.root, point.run)
        write_run(study.root, point.run)
    wanted, given_up = study.points
    folder = study.root.study("tiny")
    control = Control(folder / "control.jsonl")
    if how == "cancelled":
        control.append("cancelled", runs=[given_up.run_id])
    else:
        with begin_run(study.root, given_up.run) as journal:
            journal.append(Event.FAILED, reason="its loss is not a number", kind="diverged")
    array = Array(
        name="ssmscale-a",
        shape=Shape(nodes=1, ranks=1, threads=1, memory_gib=1),
        tasks=tuple(
            Task(series_id=point.series_id, run_dirs=(study.root.run(point.run_id),))
            for point in study.points
        ),
        packed=True,
        process=identify_process(),
        t=time.time(),
    )
    dispatcher = Finishing(study)
    assert train_tasks(array, folder, dispatcher, StopFlag()) == 0
    assert dispatcher.trained == [wanted.series_id, given_up.series_id]
    assert {read_progress(study.root.run(point.run_id)).state for point in study.points} == {Event.FINISHED}
