"""How long a controller goes on with Series that it cannot have."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from harness import see_through
from harness.dispatch.base import Handle, Job, JobState
from harness.dispatch.slurm import Array, Shape, Task
from harness.process import identify_process
from harness.ray_controller import OTHERS_SECONDS, train_tasks
from harness.rundir import Root, write_run
from harness.training.preemption import StopFlag
from tests.harness.journals import registered


class Taken:
    """Ranks that find every Series in other hands, each time after they have been asked how it goes."""

    def __init__(self, pass_by: Callable[[float], None]) -> None:
        self.pass_by = pass_by
        self.asked: dict[Handle, int] = {}

    def submit(self, jobs: Sequence[Job]) -> list[Handle]:
        handles = [Handle(job, f"{len(self.asked)}") for job in jobs]
        self.asked |= dict.fromkeys(handles, 0)
        return handles

    def poll(self, handles: Sequence[Handle]) -> Mapping[Handle, JobState]:
        self.pass_by(0.5)
        for handle in handles:
            self.asked[handle] += 1
        return {handle: JobState.BUSY if self.asked[handle] > 1 else JobState.RUNNING for handle in handles}

    def cancel(self, handles: Sequence[Handle]) -> None:
        raise AssertionError(handles)

    def log_paths(self, handle: Handle) -> list[Path]:
        raise AssertionError(handle)

    def close(self) -> None:
        pass


def test_devices_are_not_held_for_series_that_others_train(
    tmp_path: Path, study_fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Root(tmp_path / "runs")
    study = registered(root, study_fields)
    tasks = tuple(
        Task(series_id=point.series_id, run_dirs=(write_run(root, point.run),)) for point in study.points
    )
    array = Array(
        name="ssmscale-packed",
        shape=Shape(nodes=1, ranks=1, threads=1, memory_gib=1),
        tasks=tasks,
        packed=True,
        process=identify_process(),
        t=time.time(),
    )
    now = [0.0]

    def pass_by(seconds: float) -> None:
        now[0] += seconds
        assert now[0] < 3 * OTHERS_SECONDS

    monkeypatch.setattr(see_through.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(see_through.time, "sleep", pass_by)
    monkeypatch.setattr(see_through, "LOOK_SECONDS", 0.0)
    assert train_tasks(array, root.study("tiny"), Taken(pass_by), StopFlag()) == 0
    assert now[0] > OTHERS_SECONDS
