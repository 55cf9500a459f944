"""Ranks of which nothing moves are ended and started again from their last checkpoint; slow ones are left alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from harness.record import heartbeat
from harness.record.heartbeat import Activity, Heartbeat, Watch, beat_file, read_beat
from harness.record.journal import Event, read_progress
from harness.record.kinds import Kind
from harness.record.root import Root
from tests.conftest import Write
from tests.harness.faults import train_on_two_ranks
from tests.harness.journals import read_events
from tests.harness.rays import WITHOUT_MLFLOW
from tests.harness.trainer import losses, prepared
from tests.studies import Fields
from tests.waiting import PATIENCE, paced, wait_until

COMMAND = "from harness.cli.app import main; main()"


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock of heartbeats and of their watch, seconds."""
    now = [0.0]
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now[0])
    return now


class Life:
    """A rank that moves by a clock, and its watch, which looks every second."""

    def __init__(self, folder: Path, now: list[float], minimum: float) -> None:
        (folder / "logs").mkdir()
        self.folder, self.now = folder, now
        self.watch = Watch(minimum)
        self.rank = Heartbeat(folder, 0)

    def look(self) -> str | None:
        beat = read_beat(beat_file(self.folder, 0))
        assert beat is not None
        return self.watch.look({"0": beat})

    def take(self, seconds: float) -> str | None:
        """Let time pass; return the stall that was seen."""
        for _ in range(int(seconds)):
            self.now[0] += 1
            if (stall := self.look()) is not None:
                return stall
        return None

    def steps(self, seconds: float, numbers: range) -> str | None:
        for number in numbers:
            self.rank.move(Activity.STEP, number)
            if (stall := self.take(seconds)) is not None:
                return stall
        return None


def test_steps_ten_times_slower_than_before_are_left_alone_and_a_longer_pause_is_a_stall(
    tmp_path: Path, now: list[float]
) -> None:
    life = Life(tmp_path, now, minimum=300)
    assert life.steps(60, range(1, 30)) is None
    assert life.steps(600, range(30, 33)) is None
    assert life.steps(60, range(33, 90)) is None
    assert life.steps(10_000, range(90, 91)) == "nothing moved for 20 min in step 90"


def test_saves_and_evaluations_have_usual_pauses_of_their_own_and_the_first_has_four_times_the_minimum(
    tmp_path: Path, now: list[float]
) -> None:
    life = Life(tmp_path, now, minimum=300)
    life.steps(1, range(1, 10))
    for activity in (Activity.EVALUATION, Activity.SAVE):
        life.rank.move(activity, 9)
        assert life.take(1100) is None
    life.steps(1, range(10, 20))
    life.rank.move(Activity.EVALUATION, 19)
    assert life.take(10_000) is None  # 18 min are usual
    life.rank.move(Activity.STEP, 20)
    assert life.take(10_000) == "nothing moved for 5 min in step 20"


def test_a_rank_that_never_begins_is_a_stall(tmp_path: Path, now: list[float]) -> None:
    (tmp_path / "logs").mkdir()
    Heartbeat(tmp_path, 0).move(Activity.STEP, 7)
    left = heartbeat.read_beats(tmp_path)
    watch = Watch(300, left)
    for _ in range(240):
        assert watch.look(left) is None
        now[0] += 5
    assert watch.look(left) == "nothing moved for 20 min in its start"


def test_time_in_which_the_supervisor_was_suspended_with_its_ranks_does_not_count(
    tmp_path: Path, now: list[float]
) -> None:
    life = Life(tmp_path, now, minimum=300)
    life.steps(1, range(1, 10))
    now[0] += 100_000
    assert life.take(200) is None


def test_bytes_written_count_as_moves_of_what_reports_none(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    with Heartbeat(tmp_path, 0) as rank, rank.counting(heartbeat.written_bytes):
        seen = read_beat(beat_file(tmp_path, 0))
        with (tmp_path / "download").open("wb", buffering=0) as file:

            def moved() -> bool:
                file.write(b"a part")
                return read_beat(beat_file(tmp_path, 0)) not in (None, seen)

            wait_until(moved)


class Here:
    """A study that the command trains here on two ranks, which a test stops."""

    def __init__(self, study: Path, folder: Path) -> None:
        self.root, self.seen = Root(folder / "runs"), 0
        self.process = subprocess.Popen(
            [sys.executable, "-c", WITHOUT_MLFLOW + COMMAND, "submit", str(study), "--on", "local"],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**paced(0.05), "PACED_FIFO": str(folder / "fifo")},
        )

    @property
    def series(self) -> Path:
        (folder,) = (self.root.path / "series").iterdir()
        return folder

    def stop(self, rank: int, activity: Activity) -> psutil.Process:
        """Stop a rank in an activity that it has finished before, as SIGSTOP from anybody does."""

        def is_in_it() -> bool:
            assert self.process.poll() is None, self.process.communicate()[0]
            told, now = read_progress(self.series), read_beat(beat_file(self.series, rank))
            if now is None or not told.is_alive or told.started is None or now.t < told.started["t"]:
                return False  # of an earlier attempt
            return now.doing is activity and activity in now.usual

        deadline = time.monotonic() + PATIENCE
        wait_until((self.root.path / "series").exists, on=self.process)
        while time.monotonic() < deadline:
            if is_in_it():
                process = self.rank(rank)
                process.suspend()
                if is_in_it():
                    return process
                process.resume()
            time.sleep(0.001)
        raise AssertionError("waited in vain")

    def rank(self, number: int) -> psutil.Process:
        (found,) = [
            process
            for process in psutil.Process(self.process.pid).children()
            if process.environ().get("RANK") == str(number)
        ]
        return found

    def pause(self) -> float:
        """Return the seconds since the first rank has moved."""
        beat = read_beat(beat_file(self.series, 0))
        return 0.0 if beat is None else time.time() - beat.t

    def wait_for_stall(self, place: str) -> None:
        """Return when one more stall has been journalled at such a place; a slow machine may add some of a start."""

        def is_there() -> bool:
            assert self.process.poll() is None, self.process.communicate()[0]
            stalls = [
                event["reason"] for event in read_events(self.series) if event.get("kind") == Kind.STALLED
            ]
            self.seen, new = len(stalls), stalls[self.seen :]
            return any(place in reason for reason in new)

        wait_until(is_there)


def test_stopped_ranks_and_one_that_reads_for_ever_are_ended_and_go_on_from_what_was_saved(
    study_fields: Fields, write_study: Write, tmp_path: Path
) -> None:
    study_fields["grid"]["iterations"] = [200]
    study_fields["tracking"]["eval_every"] = 2
    study_fields["resources"] = {"ranks": 2, "checkpoint_every": 3, "stall_seconds": 5}
    here = Here(write_study(study_fields), tmp_path)
    here.stop(1, Activity.STEP)
    here.wait_for_stall("in step ")
    os.mkfifo(tmp_path / "fifo")
    here.wait_for_stall("in its start")
    (tmp_path / "fifo").unlink()
    here.stop(0, Activity.SAVE)
    here.wait_for_stall("in the save after step ")
    here.stop(1, Activity.EVALUATION)
    here.wait_for_stall("in the evaluation after step ")
    slow = here.stop(1, Activity.STEP)
    wait_until(lambda: here.pause() > 1.0)  # twenty usual steps
    slow.resume()
    said, _ = here.process.communicate(timeout=PATIENCE)
    assert here.process.returncode == 0, said

    log = (here.series / "logs" / "rank-1.log").read_text()
    assert log.count(" in _train_locked\n") >= 3, log  # a stack for each stop
    saved = step = 0
    for event in read_events(here.series):
        if event["event"] == Event.CHECKPOINT:
            saved = event["step"]
        elif event["event"] == Event.STEP:
            assert event["step"] > saved
            step = event["step"]
    assert step == 160
    launch = json.loads((here.series / "launch.json").read_text())
    apart = Root(tmp_path / "apart")
    ((_, runs),) = prepared(apart, study_fields, micro_batch=launch["micro_batch"])
    train_on_two_ranks([apart.run(one.run_id) for one in runs], tmp_path / "meeting")
    assert losses(here.root, study_fields) == losses(apart, study_fields)
