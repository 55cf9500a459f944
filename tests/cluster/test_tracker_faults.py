"""Training goes on under every fault of the tracker, and MLflow ends with every step once and with true statuses.

The faults are real: MLflow's server and the PostgreSQL under it are stopped, frozen, replaced by another server and
started again while `ssmscale submit` trains.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from harness.record.journal import read_progress
from harness.record.root import Root
from tests.cluster.misbehaving import Misbehaving
from tests.cluster.servers import Postgres, Served, free_port
from tests.conftest import Command, Write
from tests.harness.faults import check_mirrored
from tests.harness.trainer import losses, prepared, train
from tests.studies import Fields
from tests.waiting import PATIENCE, wait_until

pytestmark = pytest.mark.cluster

Fault = Callable[["Training", Served, "Postgres | None"], None]
Start = Callable[[Fields, str], "Training"]
Sync = Callable[[str, str], None]
FURTHER = 50
"""Steps by which training goes on while its tracker is away."""
STEPS, LOG_EVERY = 400, 10


@pytest.fixture
def long_study(study_fields: Fields) -> Fields:
    """Two runs on one trunk that train for some seconds."""
    study_fields["grid"]["iterations"] = [20, STEPS]
    study_fields["tracking"]["log_every"] = LOG_EVERY
    study_fields["resources"] = {"checkpoint_every": 10_000}
    return study_fields


@dataclass
class Training:
    """`ssmscale submit --on local` as a process of its own."""

    process: subprocess.Popen[bytes]
    root: Root
    errors: Path

    def step(self) -> int:
        """Return the newest step in a journal, of the trunk or of the branch of the longer run."""
        return max((read_progress(folder).step for folder in folders_of(self.root)), default=0)

    def is_over(self) -> bool:
        return self.process.poll() is not None

    def wait_for_step(self, step: int) -> None:
        wait_until(lambda: self.step() >= step or self.is_over())
        assert self.step() >= step, self.said()

    def go_on(self) -> None:
        """Return when training is `FURTHER` steps further, or over."""
        self.wait_for_step(min(self.step() + FURTHER, STEPS))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Suspend the workers during the block, so that training is not over before; the mirror goes on."""
        workers: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):  # training is over
            workers += psutil.Process(self.process.pid).children()
        for worker in workers:
            with suppress(psutil.NoSuchProcess):
                worker.suspend()
        try:
            yield
        finally:
            for worker in workers:
                with suppress(psutil.NoSuchProcess):
                    worker.resume()

    def wait_in_vain_for_its_tracker(self) -> None:
        """Return when it has warned that the tracker is gone."""
        self.wait_for_step(min(self.step() + LOG_EVERY, STEPS))  # otherwise it may have nothing to send
        with self.held():
            wait_until(lambda: self.warnings() or self.is_over())

    def said(self) -> str:
        return self.errors.read_text(encoding="utf-8")

    def warnings(self) -> list[str]:
        return [line for line in self.said().splitlines() if "MLflow" in line]

    def end(self) -> None:
        self.process.wait(PATIENCE)
        assert self.process.returncode == 0, self.said()


@pytest.fixture
def start_submit(tmp_path: Path, write_study: Write) -> Iterator[Start]:
    """Start `ssmscale submit --on local` of a study whose tracker is at an address."""
    started: list[subprocess.Popen[bytes]] = []

    def start(fields: Fields, address: str) -> Training:
        with (tmp_path / "out").open("wb") as out, (tmp_path / "errors").open("wb") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "harness", "submit", str(write_study(fields)), "--on", "local"],
                cwd=tmp_path,
                stdout=out,
                stderr=errors,
                env={**os.environ, "MLFLOW_TRACKING_URI": address},
            )
        started.append(process)
        return Training(process, Root(tmp_path / "runs"), tmp_path / "errors")

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
        process.wait(PATIENCE)


@pytest.fixture
def sync_to(ssmscale: Command, monkeypatch: pytest.MonkeyPatch) -> Sync:
    """Send a study to the server at an address by `ssmscale sync`."""

    def sync(address: str, study: str) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        answer = ssmscale("sync", study)
        assert answer.status == 0, answer.err

    return sync


class Undisturbed:
    """The same study without a tracker, trained once, beside the first test."""

    def __init__(self, path: Path) -> None:
        self.root = Root(path)
        self._process: subprocess.Popen[bytes] | None = None

    def begin(self, fields: Fields) -> None:
        if self._process is None:
            folders = [self.root.run(run.run_id) for _, runs in prepared(self.root, fields) for run in runs]
            with (self.root.path / "log").open("wb") as log:
                command = [sys.executable, "-m", "harness.train.worker", *map(str, folders)]
                self._process = subprocess.Popen(command, stdout=log, stderr=log)

    def losses(self, fields: Fields) -> list[float]:
        assert self._process is not None
        assert self._process.wait(PATIENCE) == 0
        return losses(self.root, fields)

    def end(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(PATIENCE)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Undisturbed]:
    study = Undisturbed(tmp_path_factory.mktemp("undisturbed"))
    yield study
    study.end()


def folders_of(root: Root) -> list[Path]:
    """Return every directory of a root that holds a journal."""
    return [*root.path.glob("series/*"), *root.path.glob("runs/*")]


def unread_bytes(port: int) -> int:
    """Return the bytes sent to a port that its server has not read, and the connections it has not taken."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]]
    return sum(int(row[4].partition(":")[2], 16) for row in rows if int(row[1].partition(":")[2], 16) == port)


# -- the faults


def stop_server(training: Training, server: Served, _: Postgres | None) -> None:
    """Stop MLflow's server, and start it again after training has warned."""
    with training.held():
        server.stop()
    training.wait_in_vain_for_its_tracker()
    training.go_on()
    with training.held():
        server.start()


def talk_nonsense(training: Training, server: Served, _: Postgres | None) -> None:
    """Put a server that answers nonsense in the place of MLflow's; then none; then MLflow's again."""
    with training.held():
        server.stop()
    with Misbehaving(server.port) as nonsense:
        with training.held():
            wait_until(lambda: nonsense.asked > 1 or training.is_over())
        training.go_on()
    with training.held():
        server.start()


def freeze_server(training: Training, server: Served, _: Postgres | None) -> None:
    """Have MLflow's server take requests and answer none for a while."""
    server.freeze()
    try:
        with training.held():
            wait_until(lambda: unread_bytes(server.port) > 0 or training.is_over())
        training.go_on()
    finally:
        server.thaw()


def crash_database(training: Training, _: Served, postgres: Postgres | None) -> None:
    """Crash PostgreSQL, and start it again after training has warned."""
    assert postgres is not None
    with training.held():
        postgres.stop()
    try:
        training.wait_in_vain_for_its_tracker()
        training.go_on()
    finally:
        with training.held():
            postgres.start()


def assert_survives(
    faults: Sequence[Fault],
    training: Training,
    server: Served,
    postgres: Postgres | None,
    fields: Fields,
    undisturbed: Undisturbed,
    *,
    at_step: int = 50,
) -> None:
    """Training ends with the losses of an undisturbed one, with a warning at most for each fault."""
    undisturbed.begin(fields)
    training.wait_for_step(at_step)
    for fault in faults:
        fault(training, server, postgres)
    training.end()
    assert losses(training.root, fields) == pytest.approx(undisturbed.losses(fields), abs=1e-6)
    assert len(training.warnings()) <= len(faults), training.said()


def test_a_server_replaced_by_nonsense_gets_every_step_when_it_is_back(
    long_study: Fields,
    start_submit: Start,
    sqlite_server: Served,
    undisturbed: Undisturbed,
    sync_to: Sync,
) -> None:
    long_study["name"] = "nonsense"
    training = start_submit(long_study, sqlite_server.address)
    assert_survives([talk_nonsense], training, sqlite_server, None, long_study, undisturbed)
    assert len(training.warnings()) == 1
    sync_to(sqlite_server.address, "nonsense")  # training may have been over before the server was back
    check_mirrored(sqlite_server.address, "nonsense", folders_of(training.root))


def test_a_frozen_server_and_a_crashed_database_get_every_step_while_training_goes_on(
    long_study: Fields,
    start_submit: Start,
    postgres_server: Served,
    postgres: Postgres,
    undisturbed: Undisturbed,
) -> None:
    long_study["name"] = "crashed"
    training = start_submit(long_study, postgres_server.address)
    faults = [freeze_server, crash_database]
    assert_survives(faults, training, postgres_server, postgres, long_study, undisturbed)
    assert len(training.warnings()) == 1  # none for the slow server
    check_mirrored(postgres_server.address, "crashed", folders_of(training.root))


def test_a_study_whose_tracker_was_never_there_is_synced_afterwards(
    study_fields: Fields,
    start_submit: Start,
    postgres_server: Served,
    sync_to: Sync,
    tmp_path: Path,
) -> None:
    study_fields["name"] = "absent"
    training = start_submit(study_fields, f"http://127.0.0.1:{free_port()}")
    apart = Root(tmp_path / "apart")
    train(apart, study_fields)
    training.end()
    assert losses(training.root, study_fields) == pytest.approx(losses(apart, study_fields), abs=1e-6)
    assert len(training.warnings()) == 1
    for _ in range(2):  # the second finds nothing to do
        sync_to(postgres_server.address, "absent")
        check_mirrored(postgres_server.address, "absent", folders_of(training.root))


@pytest.mark.verify
@pytest.mark.parametrize("at_step", [0, 1, 200, STEPS - 100])
@pytest.mark.parametrize("fault", [stop_server, talk_nonsense, freeze_server, crash_database])
def test_every_fault_at_every_stage_on_every_database(
    fault: Fault,
    at_step: int,
    long_study: Fields,
    start_submit: Start,
    mlflow_server: Served,
    request: pytest.FixtureRequest,
    undisturbed: Undisturbed,
    sync_to: Sync,
) -> None:
    if fault is crash_database and "postgres" not in request.node.name:
        pytest.skip("SQLite has no server to crash")
    postgres = request.getfixturevalue("postgres") if fault is crash_database else None
    long_study["name"] = f"{fault.__name__}-{at_step}-{request.node.callspec.params['mlflow_server']}"
    training = start_submit(long_study, mlflow_server.address)
    assert_survives([fault], training, mlflow_server, postgres, long_study, undisturbed, at_step=at_step)
    sync_to(mlflow_server.address, long_study["name"])
    check_mirrored(mlflow_server.address, long_study["name"], folders_of(training.root))
