"""A part of a larger work ends as its journal says, goes on where it was stopped, and is submitted once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from harness.dispatch.arrays import ArrayStore, new_array, new_name, read_array
from harness.dispatch.base import Backend, Handle, SubmitTarget, Task
from harness.dispatch.part import Part
from harness.plan.allocation import Shape
from harness.record.jobs import JobState, JobView
from harness.record.journal import read_progress
from harness.record.series import untrained
from harness.submit.parts import PartState, hand_over_parts, live_jobs, run_parts, states_of_parts
from harness.train import part as worker
from harness.train.part import AtWork, work_on
from harness.train.stopping import MOST_ATTEMPTS, StopFlag
from ssmttm.errors import InputError

STEPS = 3
did: list[int] = []
"""Steps that `count` has taken."""


def count(request: Mapping[str, Any], at_work: AtWork) -> None:
    """Take the steps that a file does not name yet; fail, stop or crash as the request says."""
    done = at_work.folder / "done"
    for step in range(len(done.read_text()) if done.exists() else 0, STEPS):
        if request.get("wrong"):
            raise InputError("clip.wav: is no sound")
        if request.get("crash"):
            raise ZeroDivisionError("by zero")
        did.append(step)
        with done.open("a") as file:
            file.write(".")
        at_work.moved(step + 1, STEPS)


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(worker.WORK, "count", f"{__name__}:count")
    did.clear()


def part_of(folder: Path, name: str = "p1", **request: Any) -> Part:
    return Part.of(folder / "parts" / name, "count", request)


def states(parts: Sequence[Part], folder: Path) -> list[PartState]:
    return [one.state for one in states_of_parts(parts, folder)]


class Threads(Backend):
    """Works on the parts in the calling process, one when it is asked for views."""

    name = "threads"
    dies = False

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, SubmitTarget("threads"))
        self.submitted: list[str] = []
        self.ended: dict[str, JobState] = {}

    def submit(self, tasks: Sequence[Task], name: str = "") -> list[Handle]:
        self.submitted += [task.series_id for task in tasks]
        return [Handle(task, f"{task.series_id}-{len(self.submitted)}", name) for task in tasks]

    def views(self, handles: Sequence[Handle]) -> dict[str, JobView]:
        for handle in handles:
            if handle.job_id not in self.ended:
                self.ended[handle.job_id] = JobState.LOST
                if not self.dies:
                    work_on(handle.task.order, StopFlag())
                    self.ended[handle.job_id] = JobState.ENDED
        return {handle.job_id: handle.view(self.ended[handle.job_id]) for handle in handles}

    def cancel(self, handles: Sequence[Handle]) -> None: ...

    def logs(self, handle: Handle) -> list[Path]:
        return []


def test_a_part_is_done_once_and_its_journal_says_so(tmp_path: Path) -> None:
    part = part_of(tmp_path)
    assert states([part], tmp_path) == [PartState.NEW]
    assert [work_on(part.order, StopFlag()) for _ in range(2)] == ["finished", "finished"]
    assert did == [0, 1, 2]
    assert read_progress(part.folder).step == STEPS
    assert states([part], tmp_path) == [PartState.DONE]


def test_a_part_that_is_told_to_stop_goes_on_where_it_was(tmp_path: Path) -> None:
    part, stop = part_of(tmp_path), StopFlag()
    stop.reason = signal.SIGTERM.name
    assert work_on(part.order, stop) == "preempted"
    (status,) = states_of_parts([part], tmp_path)
    assert (status.state, status.step, status.reason) == (PartState.INTERRUPTED, 1, "SIGTERM")
    assert work_on(part.order, StopFlag()) == "finished"
    assert did == [0, 1, 2]


def test_two_processes_never_work_on_one_part(tmp_path: Path) -> None:
    part = part_of(tmp_path)
    part.folder.mkdir(parents=True)
    found: list[str] = []
    with untrained(part.folder):
        thread = threading.Thread(target=lambda: found.append(work_on(part.order, StopFlag())))
        thread.start()
        thread.join()
    assert found == ["busy"]


@pytest.mark.parametrize(
    ("request_", "reason"),
    [({"wrong": True}, "clip.wav: is no sound"), ({"crash": True}, "ZeroDivisionError: by zero")],
)
def test_a_failure_is_told_with_its_reason_and_tried_again_when_asked(
    tmp_path: Path, request_: dict[str, Any], reason: str
) -> None:
    parts = [part_of(tmp_path, "bad", **request_), part_of(tmp_path, "good")]
    for attempt in (1, 2):
        ended = run_parts(parts, Threads(tmp_path), tmp_path)
        assert [one.state for one in ended] == [PartState.FAILED, PartState.DONE]
        assert ended[0].reason == reason
        assert read_progress(parts[0].folder).attempt == attempt


def test_a_part_whose_worker_dies_again_and_again_is_given_up(tmp_path: Path) -> None:
    part, backend = part_of(tmp_path), Threads(tmp_path)
    backend.dies = True
    (ended,) = run_parts([part], backend, tmp_path)
    assert ended.state is PartState.FAILED
    assert f"ended {MOST_ATTEMPTS} times at the same place" in str(ended.reason)
    assert len(backend.submitted) == MOST_ATTEMPTS


def test_an_order_that_is_none_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does: 'dance': no such work"):
        work_on({"does": "dance", "folder": str(tmp_path / "parts" / "p"), "request": {}}, StopFlag())
    with pytest.raises(InputError, match="folder"):
        work_on({"does": "count"}, StopFlag())


def test_an_array_keeps_parts_and_series_apart(tmp_path: Path) -> None:
    series = Task(series_id="s", run_dirs=(tmp_path / "runs" / "r",))
    part = part_of(tmp_path, speed=2)
    array = new_array(new_name(), Shape(nodes=1, ranks=1, threads=1, memory_gib=1), [series, part])
    store = ArrayStore(tmp_path)
    store.write(array)
    read = read_array(store.path_of(array), array.digest)
    assert [type(task) for task in read.tasks] == [Task, Part]
    assert read.tasks[1].order == part.order


class Queue(Threads):
    """A scheduler that has the jobs of all arrays."""

    name, outlives = "queue", True
    state = JobState.QUEUED

    def submit(self, tasks: Sequence[Task], name: str = "") -> list[Handle]:
        shape = Shape(nodes=1, ranks=1, threads=1, memory_gib=1)
        array = new_array(name, shape, tasks, backend="queue")
        self.submitted += [task.series_id for task in tasks]
        return ArrayStore(self.study_dir).submit(array, lambda _: str(len(self.submitted)))

    def views(self, handles: Sequence[Handle]) -> dict[str, JobView]:
        return {handle.job_id: handle.view(self.state) for handle in handles}


@contextmanager
def queue_at(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Queue]:
    queue = Queue(folder)
    monkeypatch.setattr("harness.dispatch.ledger.open_backend", lambda *_: queue)
    yield queue


def test_a_part_is_handed_over_once_while_its_job_lives_and_again_when_it_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [part_of(tmp_path, name) for name in ("p1", "p2")]
    work_on(parts[1].order, StopFlag())
    with queue_at(tmp_path, monkeypatch) as queue:
        first, second = (hand_over_parts(parts, queue, tmp_path) for _ in range(2))
        assert [handle.task.series_id for handle in first.handles] == ["p1"]
        assert second.handles == []
        assert [one.state for one in second.states] == [PartState.QUEUED, PartState.DONE]
        queue.state = JobState.LOST
        assert live_jobs(tmp_path) == {}
        assert [handle.task.series_id for handle in hand_over_parts(parts, queue, tmp_path).handles] == ["p1"]


def test_a_text_of_a_request_that_is_no_path_hides_no_path(tmp_path: Path) -> None:
    part = part_of(tmp_path, words=["/" + "long " * 100, "/\0"], made=str(tmp_path / "new" / "file"))
    assert part.paths[1:] == [tmp_path]
