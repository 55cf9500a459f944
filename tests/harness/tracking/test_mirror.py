"""A mirror during training: a failing tracker costs one warning, and a submission does not wait for it."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness.common.validation import validate
from harness.record.journal import Journal, ProgressReader
from harness.record.root import Launch, Root
from harness.study.schema import Study
from harness.tracking import live
from harness.tracking.live import MirrorThread, mirrored_beside
from harness.tracking.server import Server, lines
from harness.tracking.store import default_uri, sidecar_uri
from harness.tracking.tracker import Tracker
from tests.harness import tracked, trainer
from tests.harness.journals import begin_series, log_steps, registered, rows_of, write_finished
from tests.studies import Fields
from tests.waiting import PATIENCE, is_running, wait_until


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "ssmscale.tracking"]


def test_an_unreachable_tracker_costs_one_warning_and_nothing_else(
    study: tracked.Study, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(live, "LAST_PAUSE", 0.0)
    monkeypatch.setattr(live, "EVERY_SECONDS", 0.01)
    write_finished(study.root, study.points)
    thread = MirrorThread("http://127.0.0.1:9", "tiny", study.root)
    thread.start()
    thread.finish(rows_of(study.root, study.fields))
    assert thread.problem is not None
    (warning,) = warnings_of(caplog)
    assert "the journals keep everything" in warning


def test_a_tracker_that_comes_back_gets_what_it_missed(
    study: tracked.Study,
    trunk: Journal,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(live, "EVERY_SECONDS", 0.01)
    database = study.root.path / "mlflow.db"
    content = database.read_bytes()
    database.write_bytes(b"this is no database" * 100)
    thread = MirrorThread(default_uri(study.root), "tiny", study.root)
    thread.show(rows_of(study.root, study.fields))
    thread.start()
    wait_until(lambda: thread.problem)
    log_steps(trunk, [1, 2, 3])
    with database.open("r+b") as file:  # never empty: MLflow would create its tables in an empty file
        file.write(content)
    wait_until(lambda: thread.problem is None)
    thread.finish(rows_of(study.root, study.fields))
    assert study.steps() == [1, 2, 3]
    assert len([text for text in warnings_of(caplog) if "journals keep everything" in text]) == 1


def test_the_end_of_a_submission_does_not_wait_for_a_tracker_without_progress(
    study: tracked.Study, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(live, "STUCK_SECONDS", 0.5)
    answered = threading.Event()
    monkeypatch.setattr(Tracker, "mirror", lambda *_, **__: answered.wait())
    thread = MirrorThread(default_uri(study.root), "tiny", study.root)
    thread.start()
    thread.finish(rows_of(study.root, study.fields))
    answered.set()
    assert any("ssmscale sync tiny" in text for text in warnings_of(caplog))


def test_a_mirror_keeps_no_journal_of_a_finished_series(
    tracked_root: Root, study_fields: Fields, monkeypatch: pytest.MonkeyPatch
) -> None:
    study_fields["grid"]["seeds"] = [0, 1, 2]
    write_finished(tracked_root, registered(tracked_root, study_fields).points)
    rows = rows_of(tracked_root, study_fields)
    most, read = 0, ProgressReader.read
    tracker = Tracker(default_uri(tracked_root), "tiny", tracked_root)

    def watched(self: ProgressReader, directory: Path) -> Any:
        nonlocal most
        most = max(most, len(tracker._series))
        return read(self, directory)

    monkeypatch.setattr(ProgressReader, "read", watched)
    tracker.mirror(rows)
    assert (most, len(tracker._series)) == (1, 0)


# -- the sidecar of a worker


@pytest.mark.parametrize(
    ("address", "is_given"),
    [
        ("", False),  # the SQLite file of ROOT
        ("http://127.0.0.1:9", True),
        ("http://me:secret@127.0.0.1:9", False),
        ("postgresql://me:secret@127.0.0.1:9/runs", False),
    ],
)
def test_a_sidecar_gets_neither_an_sqlite_file_nor_a_password(
    study_fields: Fields, here: Root, monkeypatch: pytest.MonkeyPatch, address: str, is_given: bool
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    given = sidecar_uri(validate(Study, study_fields, "test"), here)
    assert given == (address if is_given else None)


def prepared(root: Root, fields: Fields, tracking: str | None = "http://127.0.0.1:9") -> str:
    """Write what a sidecar reads of a Series; by default its tracker is unreachable."""
    registered(root, fields)
    ((_, runs),) = trainer.prepared(root, fields, tracking=tracking)
    begin_series(root, runs[0])
    return str(runs[0].series_id)


def sidecar_command(root: Root, series_id: str) -> list[str]:
    """Return the command of a sidecar without MLflow that repeats its last round without pauses."""
    program = "import sys; sys.modules['mlflow'] = None; from harness.tracking import live; "
    program += "live.LAST_PAUSE = 0.0; sys.exit(live.main())"
    return [sys.executable, "-c", program, str(root.study("tiny")), series_id]


@pytest.mark.parametrize("tracking", [None, "sqlite:////tmp/nowhere.db"])
def test_a_sidecar_refuses_to_open_a_file(here: Root, study_fields: Fields, tracking: str | None) -> None:
    series_id = prepared(here, study_fields, tracking)
    command = sidecar_command(here, series_id)
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 2
    assert "names no tracker for other machines" in done.stderr
    assert "Traceback" not in done.stderr


START_A_SIDECAR = """
import sys
from pathlib import Path
from harness.record.root import Root, read_launch
from harness.tracking.live import mirrored_beside
root, series_id = Root(Path(sys.argv[1])), sys.argv[2]
with mirrored_beside(read_launch(root, series_id), root, series_id):
    print("started", flush=True)
    sys.stdin.read()
"""


def test_a_sidecar_ends_with_its_worker(here: Root, study_fields: Fields) -> None:
    series_id = prepared(here, study_fields)
    worker = subprocess.Popen(
        [sys.executable, "-c", START_A_SIDECAR, str(here.path), series_id],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert worker.stdout is not None
    assert worker.stdout.readline() == "started\n"
    (sidecar,) = psutil.Process(worker.pid).children()
    log_file = here.series(series_id) / "logs" / "mirror.log"
    wait_until(lambda: "the journals keep everything" in log_file.read_text())
    worker.communicate(timeout=PATIENCE)
    wait_until(lambda: not is_running(sidecar))
    assert "Traceback" not in log_file.read_text()


def test_a_sidecar_whose_worker_ended_before_it_started_ends(here: Root, study_fields: Fields) -> None:
    series_id = prepared(here, study_fields)
    command = sidecar_command(here, series_id)
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE, check=True
    )
    assert "the journals keep everything" in done.stderr


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


def test_training_goes_on_without_a_sidecar_whose_log_is_a_link(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root, mine = Root(tmp_path / "runs"), tmp_path / "mine"
    mine.write_text("kept")
    logs = root.series("aaaa") / "logs"
    logs.mkdir(parents=True)
    (logs / "mirror.log").symlink_to(mine)
    facts = {
        "corpus": tmp_path,
        "control": tmp_path / "control.jsonl",
        "dispatcher": "test",
        "micro_batch": 1,
    }
    with mirrored_beside(Launch(**facts, tracking="sqlite:///none.db"), root, "aaaa"):
        pass
    assert "is not mirrored while it trains" in caplog.text
    assert mine.read_text() == "kept"


@pytest.mark.parametrize(
    ("proxies", "line"),
    [
        ({}, None),
        ({"http_proxy": "http://proxy:3128"}, 'export no_proxy="127.0.0.1,${no_proxy:-$NO_PROXY}"'),
        ({"ALL_PROXY": "http://proxy:3128"}, 'export no_proxy="127.0.0.1,${no_proxy:-$NO_PROXY}"'),
        ({"http_proxy": "http://proxy:3128", "no_proxy": "127.0.0.1"}, None),
        ({"https_proxy": "http://proxy:3128"}, None),
    ],
)
def test_the_environment_of_a_server_leads_around_a_proxy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proxies: dict[str, str], line: str | None
) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name, value in proxies.items():
        monkeypatch.setenv(name, value)
    server = Server(Root(tmp_path), "sqlite:///x.db", "127.0.0.1", 5000, (), tmp_path / "log", None)
    address = "http://127.0.0.1:5000"
    exports = [f"export MLFLOW_TRACKING_URI={address}", *([line] if line else [])]
    assert lines(server, show_password=False) == [address, *exports]
