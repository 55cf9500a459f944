"""A mirror beside training: what a tracker does costs one warning, and the end of a submission never hangs on it."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from harness.common.validation import validate
from harness.record.journal import ProgressReader
from harness.record.root import Launch, Root, write_launch
from harness.study.schema import Study
from harness.tracking import live as mirror
from harness.tracking.live import MirrorThread, mirrored_beside
from harness.tracking.store import default_uri, sidecar_uri
from harness.tracking.tracker import Tracker
from tests.harness.journals import begin_series, log_steps, registered, rows_of, write_finished
from tests.studies import Fields
from tests.waiting import PATIENCE, is_running, wait_until


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "ssmscale.tracking"]


def test_a_tracker_that_is_gone_costs_one_warning_and_nothing_else(
    tracked_root: Root, study_fields: Fields, caplog: pytest.LogCaptureFixture
) -> None:
    write_finished(tracked_root, registered(tracked_root, study_fields).points)
    thread = MirrorThread("http://127.0.0.1:9", "tiny", tracked_root, every_seconds=0.01)
    thread.start()
    thread.finish(rows_of(tracked_root, study_fields))
    assert thread.rounds.problem is not None
    assert len(warnings_of(caplog)) == 1
    assert "the journals keep everything" in warnings_of(caplog)[0]


def test_a_tracker_that_comes_back_gets_what_it_missed(
    tracked_root: Root, study_fields: Fields, caplog: pytest.LogCaptureFixture
) -> None:
    points = registered(tracked_root, study_fields).points
    journal = begin_series(tracked_root, points[0].run)
    database = tracked_root.path / "mlflow.db"
    content = database.read_bytes()
    database.write_bytes(b"this is no database" * 100)
    thread = MirrorThread(default_uri(tracked_root), "tiny", tracked_root, every_seconds=0.01)
    thread.show(rows_of(tracked_root, study_fields))
    thread.start()
    wait_until(lambda: thread.rounds.problem)
    log_steps(journal, [1, 2, 3])
    with database.open("r+b") as file:  # never empty: an empty file is a store whose tables are to be made
        file.write(content)
    wait_until(lambda: thread.rounds.problem is None)
    thread.finish(rows_of(tracked_root, study_fields))
    tracker = Tracker(default_uri(tracked_root), "tiny", tracked_root)
    (held,) = [one for one in tracker.experiment.search() if one.kind == "series"]
    assert tracker.experiment.steps_of(held, ["train_loss"]) == {("train_loss", step) for step in (1, 2, 3)}
    assert len([text for text in warnings_of(caplog) if "journals keep everything" in text]) == 1


def test_the_end_of_a_submission_does_not_wait_for_a_tracker_that_gets_nowhere(
    tracked_root: Root,
    study_fields: Fields,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    write_finished(tracked_root, registered(tracked_root, study_fields).points)
    monkeypatch.setattr(mirror, "STUCK_SECONDS", 0.5)
    answered = threading.Event()
    monkeypatch.setattr(Tracker, "mirror", lambda *_, **__: answered.wait())
    thread = MirrorThread(default_uri(tracked_root), "tiny", tracked_root)
    thread.start()
    thread.finish(rows_of(tracked_root, study_fields))
    answered.set()
    assert any("ssmscale sync tiny" in text for text in warnings_of(caplog))


def test_what_a_mirror_read_of_finished_series_is_let_go(
    tracked_root: Root, study_fields: Fields, monkeypatch: pytest.MonkeyPatch
) -> None:
    study_fields["grid"]["seeds"] = list(range(6))
    points = registered(tracked_root, study_fields).points
    write_finished(tracked_root, points)
    most, read = 0, ProgressReader.read
    tracker = Tracker(default_uri(tracked_root), "tiny", tracked_root)

    def watched(self: ProgressReader, directory: Path) -> Any:
        nonlocal most
        most = max(most, len(tracker._series))
        return read(self, directory)

    monkeypatch.setattr(ProgressReader, "read", watched)
    rows = rows_of(tracked_root, study_fields)
    most = 0
    tracker.mirror(rows)
    assert (most, len(tracker._series)) == (1, 0)


# -- beside a worker


def test_a_mirror_beside_a_worker_is_never_given_an_sqlite_file(
    tracked_root: Root, study_fields: Fields, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    study = validate(Study, study_fields, "test")
    assert sidecar_uri(study, tracked_root) is None
    study_fields["tracking"]["uri"] = "http://127.0.0.1:9"
    assert sidecar_uri(validate(Study, study_fields, "test"), tracked_root) == "http://127.0.0.1:9"


@pytest.mark.parametrize(
    "address", ["http://me:secret@127.0.0.1:9", "postgresql://me:secret@127.0.0.1:9/runs"]
)
def test_a_password_of_the_environment_is_not_written_beside_the_series(
    tracked_root: Root, study_fields: Fields, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    assert sidecar_uri(validate(Study, study_fields, "test"), tracked_root) is None


def prepared(root: Root, fields: Fields, tracking: str | None) -> tuple[str, Launch]:
    resolved = registered(root, fields)
    run = resolved.points[0].run
    begin_series(root, run)
    launch = Launch(
        corpus=resolved.study.corpus.path,
        control=root.study("tiny") / "control.jsonl",
        dispatcher="test",
        micro_batch=8,
        tracking=tracking,
    )
    write_launch(root, run.series_id, launch)
    return run.series_id, launch


def mirror_command(root: Root, series_id: str) -> list[str]:
    return [sys.executable, "-m", "harness.tracking.live", str(root.study("tiny")), series_id]


@pytest.mark.parametrize("tracking", [None, "sqlite:////tmp/nowhere.db"])
def test_a_mirror_beside_a_worker_refuses_to_open_a_file(
    tracked_root: Root, study_fields: Fields, tracking: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    series_id, _ = prepared(tracked_root, study_fields, tracking)
    command = mirror_command(tracked_root, series_id)
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 2
    assert "names no tracker for other machines" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_mirror_beside_a_worker_ends_with_its_series_and_leaves_no_process(
    tracked_root: Root, study_fields: Fields
) -> None:
    series_id, launch = prepared(tracked_root, study_fields, "http://127.0.0.1:9")
    log_file = tracked_root.series(series_id) / "logs" / "mirror.log"
    with mirrored_beside(launch, tracked_root, series_id):
        wait_until(lambda: log_file.exists() and "the journals keep everything" in log_file.read_text())
    assert "Traceback" not in log_file.read_text()


START_A_MIRROR = """
import subprocess, sys, time
mirror = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE)
print(mirror.pid, flush=True)
time.sleep(600)
"""


def test_a_mirror_beside_a_worker_that_is_killed_ends_too(tracked_root: Root, study_fields: Fields) -> None:
    import psutil

    series_id, _ = prepared(tracked_root, study_fields, "http://127.0.0.1:9")
    worker = subprocess.Popen(
        [sys.executable, "-c", START_A_MIRROR, *mirror_command(tracked_root, series_id)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert worker.stdout is not None
    assert worker.stderr is not None
    beside = psutil.Process(int(worker.stdout.readline()))
    assert "the journals keep everything" in worker.stderr.readline()
    worker.send_signal(signal.SIGKILL)
    worker.wait(PATIENCE)
    wait_until(lambda: not is_running(beside))


def test_a_mirror_whose_worker_is_done_before_it_begins_does_not_stay(
    tracked_root: Root, study_fields: Fields
) -> None:
    series_id, _ = prepared(tracked_root, study_fields, "http://127.0.0.1:9")
    command = mirror_command(tracked_root, series_id)
    subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE, check=True)


def test_a_process_that_trains_imports_no_mlflow_though_deepspeed_would() -> None:
    program = (
        "import importlib.util, sys\n"
        "from harness.train.ranks import initialise_ranks\n"
        "initialise_ranks(1)\n"
        "assert 'deepspeed' in sys.modules and 'mlflow' not in sys.modules\n"
        "assert importlib.util.find_spec('mlflow'), 'it can no longer be imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
