"""A Series that is lost again and again is given up, and a retry starts counting anew."""

from __future__ import annotations

import pytest

from harness.dispatch.base import Handle, Task
from harness.dispatch.supervise import JobSupervisor
from harness.record.control import Control
from harness.record.jobs import JobState
from harness.record.journal import read_progress
from harness.record.registry import ResolvedStudy
from harness.record.series import unfinished
from harness.submit.cancel import reset_attempts
from harness.submit.monitor import rows_of
from harness.train.stopping import MOST_ATTEMPTS
from tests.harness.dispatch.fakes import FakeBackend


@pytest.mark.parametrize("stalls", [False, True], ids=["killed", "stalled"])
def test_a_retry_has_as_many_attempts_as_the_first_submission(resolved: ResolvedStudy, stalls: bool) -> None:
    root, name = resolved.root, resolved.study.name
    control = Control(root.study(name) / "control.jsonl")

    def lost(handle: Handle) -> JobState:
        if stalls:
            handle.task.note_stall("nothing moved for 5 min in step 7")
        return JobState.LOST

    backend = FakeBackend(root.study(name), lost)
    supervisor = JobSupervisor(control, backend)
    run_dirs = tuple(root.run(point.run_id) for point in resolved.points)
    task = Task(series_id=resolved.points[0].series_id, run_dirs=run_dirs)

    def count_submissions() -> int:
        """Submit the Series until it is given up."""
        times = 0
        while unfinished(run_dirs, control):
            supervisor.watch_over(backend.submit([task]))
            supervisor.watch()
            times += 1
        return times

    assert count_submissions() == MOST_ATTEMPTS
    reason = str((read_progress(run_dirs[0]).result or {})["reason"])
    assert "its worker ended 3 times at the same place" in reason
    assert ("nothing moved for 5 min in step 7; the stacks are in" in reason) is stalls
    assert len(reset_attempts(root, name, rows_of(resolved))) == len(run_dirs)
    assert count_submissions() == MOST_ATTEMPTS
