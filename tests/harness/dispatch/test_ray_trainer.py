"""A long Series in a Ray Train trainer, on a real Ray: what it becomes of it, and what comes between."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness.dispatch.base import Task
from harness.dispatch.ray.trainer import START_SECONDS, is_long
from harness.record.journal import Event, read_events, read_progress
from harness.record.root import Root
from harness.train.stopping import StopFile
from tests.harness.rays import Here
from tests.harness.train.test_zero import train_on_ranks
from tests.harness.trainer import losses, prepared, series_folder, undisturbed
from tests.waiting import PATIENCE, wait_until

Fields = dict[str, Any]
DRIVER = """\
import json, select, sys, time
from pathlib import Path
import ray
from ray.util.placement_group import placement_group, remove_placement_group
from harness.dispatch.base import Task
from harness.record.jobs import JobState
from harness.dispatch.ray.dispatcher import RayDispatcher

def free_cores():
    return ray.available_resources().get("CPU", 0.0)

series_id, run_dirs, ranks, log_dir, logs = json.loads(sys.argv[1])
ray.init(log_to_driver=False)
others = placement_group([{"CPU": 2}])
while free_cores():
    time.sleep(0.1)
dispatcher = RayDispatcher(Path(logs))
job = Task(series_id=series_id, run_dirs=tuple(map(Path, run_dirs)), ranks=ranks, seconds=1e6)
(handle,) = dispatcher.submit([job])
assert dispatcher.views([handle])[handle.job_id].state is JobState.QUEUED
remove_placement_group(others)
while (state := dispatcher.views([handle])[handle.job_id].state) in {JobState.QUEUED, JobState.RUNNING}:
    if select.select([sys.stdin], [], [], 0.1)[0] and sys.stdin.readline():
        dispatcher.groups[0].let_go(600)
deadline = time.monotonic() + 300
while (cores := free_cores()) < 2 and time.monotonic() < deadline:
    time.sleep(0.1)  # Ray counts what was let go a moment later
print(json.dumps([state, cores, dispatcher._pace.factor(job.architecture)]), flush=True)
dispatcher.close()
"""


class Story:
    """A study of one Series, trained by a dispatcher that takes it for a long one."""

    def __init__(self, tmp_path: Path, here: Here, fields: Fields, ranks: int = 1, **launch: Any) -> None:
        self.root, self.here, self.fields, self.ranks = Root(tmp_path / "runs"), here, fields, ranks
        self.launch = {"dispatcher": "ray", "micro_batch": 8 // ranks, "checkpoint_every": 25, **launch}
        ((_, runs),) = prepared(self.root, fields, **self.launch)
        self.run_dirs = [self.root.run(run.run_id).absolute() for run in runs]
        self.series = series_folder(self.root)
        self.logs = tmp_path / "logs"

    def dispatch(self) -> subprocess.Popen[str]:
        """Hand it to a dispatcher in a process of its own."""
        told = [self.series.name, [str(path) for path in self.run_dirs], self.ranks]
        return subprocess.Popen(
            [
                sys.executable,
                "-c",
                DRIVER,
                json.dumps([*told, str(self.series / "logs"), str(self.logs)]),
            ],
            env={**os.environ, **self.here.address.environment()},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def wait_for_step(self, step: int) -> psutil.Process:
        """Wait until training got there; returns the first rank's process."""
        wait_until(lambda: read_progress(self.series).step >= step, at_once=True)
        started = read_progress(self.series).started
        assert started is not None
        return psutil.Process(started["pid"])

    def events(self, folder: Path) -> list[str]:
        """What a journal tells, beside steps and checkpoints."""
        told = (Event.STARTED, Event.RESUMED, Event.PREEMPTED, Event.FINISHED, Event.FAILED, Event.WARNING)
        return [event["event"] for event in read_events(folder) if event["event"] in told]


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Here]:
    """A Ray of this test's own, of two cores, on which training takes its time."""
    ray = Here(tmp_path / "ray", step_seconds=0.02)
    try:
        yield ray
    finally:
        ray.stop()


def ending(driver: subprocess.Popen[str]) -> tuple[str, float, float]:
    """How the job ended for the dispatcher, the cores that were free again by then, and by what it corrects plans."""
    said, _ = driver.communicate(timeout=PATIENCE)
    assert driver.returncode == 0
    state, cores, factor = json.loads(said.splitlines()[-1])
    return state, cores, factor


def test_a_trainer_waits_for_cores_that_others_hold_and_starts_again_a_worker_that_was_killed(
    tmp_path: Path, here: Here, study_fields: Fields
) -> None:
    study_fields["grid"]["iterations"] = [150]
    story = Story(tmp_path, here, study_fields)
    driver = story.dispatch()
    worker = story.wait_for_step(30)
    assert "RayTrainWorker" in worker.name() + " ".join(worker.cmdline())
    worker.kill()
    assert ending(driver) == ("ended", 2.0, 1.0)  # of what was started again nothing is learnt
    assert losses(story.root, study_fields) == pytest.approx(undisturbed(tmp_path, study_fields), abs=1e-6)
    assert story.events(story.series) == ["started", "resumed", "finished"]
    assert story.events(story.run_dirs[0]) == ["started", "finished"]
    first, again = [e for e in read_events(story.series) if e["event"] in {"started", "resumed"}]
    assert (first["dispatcher"], first["layout"]["threads"]) == ("ray", 1)
    assert first["pid"] != again["pid"]
    assert "resumed from" in (story.series / "logs" / "rank-0.log").read_text()
    assert not list((story.logs / "trainers").iterdir())


@pytest.mark.verify
def test_two_ranks_of_a_trainer_stop_when_they_are_asked_and_end_like_two_plain_ones(
    tmp_path: Path, here: Here, study_fields: Fields
) -> None:
    study_fields["grid"]["iterations"] = [10, 150]
    plain = Root(tmp_path / "plain")
    ((_, runs),) = prepared(plain, study_fields, micro_batch=4)
    train_on_ranks(2, [plain.run(run.run_id) for run in runs])
    story = Story(tmp_path, here, study_fields, ranks=2)
    driver = story.dispatch()
    story.wait_for_step(30)
    assert driver.stdin is not None
    driver.stdin.write("stop\n")
    driver.stdin.flush()
    assert ending(driver)[0] == "preempted"
    (stopped,) = [event for event in read_events(story.series) if event["event"] == "preempted"]
    assert stopped["reason"] == "SIGTERM"
    state, _, factor = ending(story.dispatch())
    assert state == "ended"
    assert factor < 0.1  # its plan said 1e6 seconds
    assert losses(story.root, study_fields) == pytest.approx(losses(plain, study_fields), abs=1e-6)
    assert story.events(story.series) == ["started", "preempted", "resumed", "finished"]


def test_only_a_series_that_trains_much_longer_than_a_trainer_takes_to_start_gets_one(tmp_path: Path) -> None:
    def job(seconds: float, gpu_fraction: float = 1.0) -> Task:
        return Task(series_id="s", run_dirs=(), seconds=seconds, gpu_fraction=gpu_fraction)

    assert is_long(job(21 * START_SECONDS))
    assert not is_long(job(19 * START_SECONDS))
    assert not is_long(job(21 * START_SECONDS, gpu_fraction=0.5))


def test_a_stop_file_is_heeded_when_a_word_is_written_into_it_and_not_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("harness.train.stopping.time.monotonic", lambda: now[0])
    flag = StopFile(tmp_path / "stop")
    assert flag.reason is None  # the file system is away
    StopFile.make(tmp_path / "stop")
    now[0] += 2
    assert flag.reason is None
    StopFile.ask(tmp_path / "stop", "SIGTERM")
    assert flag.reason is None  # looked a moment ago
    now[0] += 2
    assert flag.reason == "SIGTERM"
    (tmp_path / "stop").unlink()
    now[0] += 2
    assert flag.reason == "SIGTERM"


def test_a_stop_file_is_written_where_the_disk_is_full(small_disk: Callable[[int], Path]) -> None:
    disk = small_disk(64 * 1024)
    StopFile.make(disk / "stop")
    with pytest.raises(OSError, match="No space left"):
        (disk / "rest").write_bytes(bytes(64 * 1024))
    with pytest.raises(OSError, match="No space left"):
        (disk / "more").write_text("SIGTERM")
    StopFile.ask(disk / "stop", "SIGTERM")
    assert StopFile(disk / "stop").reason == "SIGTERM"
