"""A tracker that does not answer costs one line and little time; a slow one that goes on answering gets everything."""

from __future__ import annotations

import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from threading import Event, Thread

import pytest

from harness.record.root import Root
from harness.tracking import live, watch
from harness.tracking.live import MirrorThread
from harness.tracking.store import prepare_database
from harness.tracking.watch import TrackerSilent, Watch
from harness.tuning.storage import open_database
from ssmttm.errors import InputError
from tests.cluster.servers import free_port
from tests.conftest import Command
from tests.harness import trainer
from tests.harness.journals import begin_series, registered, rows_of, write_finished
from tests.harness.tracked import Calls, Study
from tests.studies import Fields
from tests.waiting import PATIENCE


@contextmanager
def listening(serve: Callable[[socket.socket], None], backlog: int = 50) -> Iterator[int]:
    """Listen on a port of the loopback; `serve` gets the listening socket in a thread."""
    with closing(socket.create_server(("127.0.0.1", 0), backlog=backlog)) as server:
        Thread(target=serve, args=(server,), daemon=True).start()
        yield server.getsockname()[1]
        with suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)


def accept_and_say_nothing(server: socket.socket) -> None:
    held = []
    with suppress(OSError):
        while True:
            held.append(server.accept())


def answer_drop_by_drop(server: socket.socket) -> None:
    """Answer a first request, and send a byte of every other answer now and then."""

    def drip(taken: socket.socket) -> None:
        with suppress(OSError), taken:
            first = taken.recv(10_000)
            taken.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
            while first:
                taken.sendall(b" ")
                taken.settimeout(0.2)
                with suppress(TimeoutError):
                    first = taken.recv(10_000)

    with suppress(OSError):
        while True:
            Thread(target=drip, args=(server.accept()[0],), daemon=True).start()


@contextmanager
def nowhere() -> Iterator[int]:
    """Yield a port that takes no connection and refuses none, as an address behind a firewall does."""
    with closing(socket.create_server(("127.0.0.1", 0), backlog=0)) as server:
        port, held = server.getsockname()[1], []
        for _ in range(4):
            held.append(socket.socket())
            held[-1].setblocking(False)
            with suppress(BlockingIOError):
                held[-1].connect(("127.0.0.1", port))
        yield port
        for one in held:
            one.close()


@contextmanager
def bad_tracker(kind: str, study: Study, folder: Path) -> Iterator[str]:
    """Yield the address of a tracker of a kind that fails or does not answer."""
    scheme, _, fault = kind.partition(" ")
    if scheme == "sqlite":
        (folder / "locked.db").write_bytes((study.root.path / "mlflow.db").read_bytes())
        with closing(sqlite3.connect(folder / "locked.db", isolation_level=None)) as other:
            other.execute(f"BEGIN {fault}")
            yield f"sqlite:///{folder}/locked.db"
        return
    login = "postgresql://me:s3cret@" if scheme == "postgresql" else "http://"
    if fault == "refuses":
        yield f"{login}127.0.0.1:{free_port()}/db"
    elif fault == "has no address":
        yield f"{login}no-such-host.example.invalid/db"
    elif fault == "is out of reach":
        with nowhere() as port:
            yield f"{login}127.0.0.1:{port}/db"
    else:
        with listening(accept_and_say_nothing if fault == "is silent" else answer_drop_by_drop) as port:
            yield f"{login}127.0.0.1:{port}/db"


KINDS = [
    *(
        "postgresql refuses",
        "postgresql is silent",
        "postgresql is out of reach",
        "postgresql has no address",
    ),
    *("http refuses", "http is silent", "http is out of reach", "http has no address", "http drips"),
    *("sqlite EXCLUSIVE", "sqlite IMMEDIATE"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_tracker_that_does_not_answer_costs_one_line(
    study: Study, ssmscale: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    monkeypatch.setattr(watch, "FIRST_SECONDS", 0.3)
    monkeypatch.setattr(watch, "NEXT_SECONDS", 0.3)
    monkeypatch.setattr(live, "LAST_PAUSE", 0.0)
    write_finished(study.root, study.points)
    with bad_tracker(kind, study, tmp_path) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        table = ssmscale("points", "tiny", "--root", study.root.path)
        assert (table.status, table.out.count("\n")) == (0, 1 + len(study.points))
        (line,) = table.err.splitlines()
        assert line.startswith("warning: MLflow at ")
        synced = ssmscale("sync", "tiny", "--root", study.root.path)
        assert synced.status == 1
        (line,) = synced.err.splitlines()
        assert line.startswith("error: MLflow at ")
        assert "s3cret" not in table.err + synced.err
        thread = MirrorThread(address, "tiny", study.root)
        thread.start()
        thread.finish(rows_of(study.root, study.fields))
        if kind.startswith("postgresql"):
            for opened in (prepare_database, open_database):
                with pytest.raises(InputError, match="cannot be opened"):
                    opened(address, "--database")


def test_a_slow_tracker_that_goes_on_answering_gets_everything(
    study: Study, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_finished(study.root, study.points)
    tracker = study.tracker()
    assert tracker.experiment
    monkeypatch.setattr(watch, "NEXT_SECONDS", 1.0)
    calls.seconds = 0.2
    tracker.watch.call(lambda: tracker.mirror(rows_of(study.root, study.fields), settle=True))
    assert len(calls.made) * calls.seconds > 2 * watch.NEXT_SECONDS
    assert len(study.tracker().mlflow_ids()) == 4


def test_a_sidecar_ends_with_its_worker_though_its_tracker_drips(here: Root, study_fields: Fields) -> None:
    registered(here, study_fields)
    with listening(answer_drop_by_drop) as port:
        ((_, runs),) = trainer.prepared(here, study_fields, tracking=f"http://127.0.0.1:{port}")
        begin_series(here, runs[0])
        program = (
            "import sys; from harness.tracking import live, watch; watch.FIRST_SECONDS = 0.5; live.main()"
        )
        command = [sys.executable, "-c", program, str(here.study("tiny")), str(runs[0].series_id)]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE, check=True
        )
    assert "`ssmscale sync` sends the rest" in done.stderr


def test_a_mirroring_that_was_given_up_sends_nothing_later(study: Study) -> None:
    write_finished(study.root, study.points)
    tracker, patience, never = study.tracker(), Watch(), Event()
    tracker.watch = patience
    with pytest.raises(TrackerSilent), patience.waiting(-1.0):
        patience.call(never.wait)
    never.set()
    with pytest.raises(TrackerSilent, match="given up"):
        tracker.mirror(rows_of(study.root, study.fields))
    assert not study.found()


def test_what_the_ledger_holds_is_not_compared_with_mlflow(
    study: Study, ssmscale: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_finished(study.root, study.points)
    points = ("points", "tiny", "--root", study.root.path)
    first = ssmscale(*points)
    monkeypatch.setattr("harness.tracking.tracker.Experiment", None)
    again = ssmscale(*points)
    assert (again.out, again.err) == (first.out, "")
