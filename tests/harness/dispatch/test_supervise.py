"""A Series that is lost again and again is given up, and a retry starts counting anew."""

from __future__ import annotations

import pytest

from harness.dispatch.base import Handle, Task
from harness.dispatch.supervise import JobSupervisor
from harness.plan.resources import Refused
from harness.record.control import Control
from harness.record.jobs import JobState
from harness.record.journal import read_progress
from harness.record.kinds import Kind
from harness.record.registry import ResolvedStudy
from harness.record.root import Layout, write_run
from harness.record.series import unfinished
from harness.submit.cancel import reset_attempts
from harness.submit.monitor import rows_of
from harness.train.stopping import MOST_ATTEMPTS
from tests.harness.dispatch.fakes import FakeBackend
from tests.harness.journals import begin_series


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


def test_a_series_whose_worker_is_killed_for_memory_begins_again_with_half_the_micro_batch(
    resolved: ResolvedStudy,
) -> None:
    root, name, point = resolved.root, resolved.study.name, resolved.points[0]
    control = Control(root.study(name) / "control.jsonl")
    backend = FakeBackend(root.study(name), lambda _: JobState.OUT_OF_MEMORY)
    supervisor = JobSupervisor(control, backend)
    run_dirs = tuple(write_run(root, each.run) for each in resolved.points)
    task = Task(series_id=point.series_id, run_dirs=run_dirs)
    tried = []
    for micro_batch in (8, 4, 2, 1):
        supervisor.watch_over(backend.submit([task]))
        begin_series(root, point.run, layout={"micro_batch": micro_batch}, device="cpu", pid=0).close()
        supervisor.watch()
        told = read_progress(root.series(point.series_id))
        most = Refused(root.study(name)).most(point.run, Layout(), "cpu", None)
        tried.append((most, told.kind, told.stopped_by))
    said = "out of memory with micro-batch {}: the system killed it for memory"
    assert tried[:3] == [(n // 2, Kind.OUT_OF_MEMORY, said.format(n)) for n in (8, 4, 2)]
    reason = str((read_progress(run_dirs[0]).result or {})["reason"])
    assert reason.startswith(f"{said.format(1)}; no memory for a micro-batch of 1, which takes about ")
    assert not unfinished(run_dirs, control)


@pytest.mark.parametrize(
    ("device", "beside", "counts_for_all"),
    [("cpu", False, True), ("cpu", True, False), ("cuda:0", False, False)],
)
def test_a_kill_beside_other_tasks_or_of_a_process_on_a_gpu_tells_nothing_of_the_shape(
    resolved: ResolvedStudy, device: str, beside: bool, counts_for_all: bool
) -> None:
    root, name, point = resolved.root, resolved.study.name, resolved.points[0]
    run_dirs = tuple(write_run(root, each.run) for each in resolved.points)
    killed = Task(series_id=point.series_id, run_dirs=run_dirs)
    other = Task(series_id="0" * 12, run_dirs=run_dirs)

    def state_of(handle: Handle) -> JobState:
        running = JobState.RUNNING if beside else JobState.QUEUED
        return JobState.OUT_OF_MEMORY if handle.task is killed else running

    backend = FakeBackend(root.study(name), state_of)
    supervisor = JobSupervisor(Control(root.study(name) / "control.jsonl"), backend)
    supervisor.watch_over(backend.submit([killed, other]))
    begin_series(root, point.run, layout={"micro_batch": 8}, device=device, pid=0).close()
    supervisor.watch()
    refused, kind = Refused(root.study(name)), device.split(":", maxsplit=1)[0]
    assert refused.most(point.run, Layout(), kind, None) == 4
    another = point.run.model_copy(update={"seed": 9})
    assert refused.most(another, Layout(), kind, None) == (4 if counts_for_all else None)
