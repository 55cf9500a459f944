"""A SLURM job whose ranks have ended is requeued or ends, by the journals and by scontrol's answer."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from harness.dispatch.base import Task
from harness.dispatch.slurm.job import settle, start_of
from harness.record.journal import Event, read_progress
from harness.record.root import Launch, Root, write_launch, write_run
from harness.train.stopping import EXIT_PREEMPTED
from tests.harness.journals import begin_series, registered
from tests.studies import Fields


class Stopped:
    """A Series whose job is told to stop again and again, before it has saved anything."""

    def __init__(self, root: Root, fields: Fields) -> None:
        fields["grid"] |= {"iterations": [10], "seeds": [0]}
        point = registered(root, fields).points[0]
        self.root, self.run = root, point.run
        control = root.study(fields["name"]) / "control.jsonl"
        self.task = Task(series_id=point.series_id, run_dirs=(write_run(root, point.run),))
        begin_series(root, point.run).close()
        launch = Launch(corpus=Path("corpus"), control=control, dispatcher="slurm", micro_batch=1)
        write_launch(root, point.series_id, launch)

    def by(self, signal: str, code: int = 0) -> int:
        start, began = start_of(self.task), time.time() - 1
        before = start.place()
        with begin_series(self.root, self.run) as journal:
            journal.append(Event.PREEMPTED, reason=signal)
        return settle(start, code, began, before)

    def dies(self, stall: str | None = None) -> int:
        """The ranks of a later start end before they write anything, by themselves or because they stalled."""
        start, began = start_of(self.task), time.time() + 1
        before = start.place()
        if stall is not None:
            self.task.note_stall(stall)
        return settle(start, 137 if stall else 1, began, before, stall)

    @property
    def state(self) -> str | None:
        return read_progress(self.task.run_dirs[0]).state


def test_a_job_whose_time_ends_without_progress_is_started_three_times(
    scontrol: Path, tmp_path: Path, study_fields: Fields
) -> None:
    stopped = Stopped(Root(tmp_path / "runs"), study_fields)
    assert [stopped.by("SIGUSR2") for _ in range(3)] == [EXIT_PREEMPTED, EXIT_PREEMPTED, 1]
    assert scontrol.read_text().split() == ["7_0", "7_0"]
    result = read_progress(stopped.task.run_dirs[0]).result
    assert result is not None
    assert "because its time was over" in result["reason"]


def test_a_job_that_stalls_at_the_same_place_is_started_three_times(
    scontrol: Path, tmp_path: Path, study_fields: Fields
) -> None:
    stopped = Stopped(Root(tmp_path / "runs"), study_fields)
    stall = "nothing moved for 5 min in step 7"
    assert [stopped.dies(stall) for _ in range(3)] == [EXIT_PREEMPTED, EXIT_PREEMPTED, 1]
    result = read_progress(stopped.task.run_dirs[0]).result
    assert result is not None
    assert result["reason"] == f"its job 7_0 ended 3 times at the same place; {stall}"


@pytest.mark.parametrize(
    ("signal", "more"),
    [("SIGTERM", ""), ("SIGUSR2", "PreemptTime=2026-01-01T00:00:00")],
    ids=["told-to-end", "preempted"],
)
def test_a_preempted_job_is_requeued_any_number_of_times(
    scontrol: Path, tmp_path: Path, study_fields: Fields, signal: str, more: str
) -> None:
    (tmp_path / "more").write_text(more)
    stopped = Stopped(Root(tmp_path / "runs"), study_fields)
    assert [stopped.by(signal) for _ in range(4)] == [EXIT_PREEMPTED] * 4
    assert scontrol.read_text().split() == ["7_0"] * 4
    assert stopped.state is None


def test_a_job_that_ran_out_of_memory_and_then_does_not_begin_is_started_three_times(
    scontrol: Path, tmp_path: Path, study_fields: Fields
) -> None:
    stopped = Stopped(Root(tmp_path / "runs"), study_fields)
    assert [stopped.by(f"out of memory with micro-batch {2**k}", code=143) for k in range(4)] == [
        EXIT_PREEMPTED
    ] * 4
    assert [stopped.dies() for _ in range(3)] == [EXIT_PREEMPTED, EXIT_PREEMPTED, 1]
    assert scontrol.read_text().split() == ["7_0"] * 6
