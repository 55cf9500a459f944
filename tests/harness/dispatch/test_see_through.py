"""What becomes of a Series that comes back again and again: it is given up, and a retry begins anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from harness.dispatch.base import Backend, Handle, SubmitTarget, Task
from harness.dispatch.supervise import JobSupervisor
from harness.record.control import Control
from harness.record.jobs import JobState, JobView
from harness.record.journal import read_progress
from harness.record.registry import ResolvedStudy
from harness.record.series import unfinished
from harness.submit.cancel import reset_attempts
from harness.submit.monitor import rows_of
from harness.train.stopping import MOST_ATTEMPTS


class Losing(Backend):
    """A dispatcher all of whose workers go away without a word."""

    name = "losing"

    def submit(self, tasks: Sequence[Task], name: str = "") -> list[Handle]:
        return [Handle(task, "0") for task in tasks]

    def views(self, handles: Sequence[Handle]) -> Mapping[str, JobView]:
        return {handle.job_id: handle.view(JobState.LOST) for handle in handles}

    def cancel(self, handles: Sequence[Handle]) -> None:
        raise AssertionError

    def logs(self, handle: Handle) -> list[Path]:
        return []


def test_a_retry_has_as_many_attempts_as_the_first_submission(resolved: ResolvedStudy) -> None:
    root, name = resolved.root, resolved.study.name
    control = Control(root.study(name) / "control.jsonl")
    backend = Losing(root.study(name), SubmitTarget("losing"))
    supervisor = JobSupervisor(control, backend)
    run_dirs = tuple(root.run(point.run_id) for point in resolved.points)
    task = Task(series_id=resolved.points[0].series_id, run_dirs=run_dirs)

    def lost() -> int:
        """Times it is handed over until it is given up."""
        times = 0
        while unfinished(run_dirs, control):
            supervisor.watch_over(backend.submit([task]))
            supervisor.watch()
            times += 1
        return times

    assert lost() == MOST_ATTEMPTS
    assert "its worker ended 3 times at the same place" in str(
        (read_progress(run_dirs[0]).result or {})["reason"]
    )
    assert len(reset_attempts(root, name, rows_of(resolved))) == len(run_dirs)
    assert lost() == MOST_ATTEMPTS
