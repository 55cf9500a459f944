"""`ssmscale serve` on real databases: what it prints, who gets in, and how it ends."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import sqlite3
import stat
from pathlib import Path

import psutil
import pytest

from harness.doctor.cluster import tracker
from harness.record.root import Root
from harness.tracking.tracker import Tracker
from tests.cluster.servers import PASSWORD, Postgres, Served, addresses, free_port
from tests.conftest import Command
from tests.harness.journals import rows_of
from tests.harness.tracked import mlflow_runs
from tests.harness.trainer import train
from tests.studies import Fields
from tests.waiting import PATIENCE, is_running, wait_until

pytestmark = pytest.mark.cluster


def test_a_study_is_tracked_through_the_server_and_its_artefacts_are_read_from_there(
    mlflow_server: Served, study_fields: Fields, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient

    root = Root(tmp_path / "runs")
    train(root, study_fields)
    rows = rows_of(root, study_fields)
    Tracker(mlflow_server.address, "tiny", root).mirror(rows, settle=True)
    assert capsys.readouterr().out == ""  # standard output is for a verb's own result
    client = MlflowClient(tracking_uri=mlflow_server.address)
    found = mlflow_runs(mlflow_server.address, "tiny")
    runs = [run for run in found if run.data.tags["ssmscale.kind"] == "run"]
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert {run.data.metrics["final.loss"] for run in runs} == {row.loss for row in rows}
    whole = {row.run_id: row.point.run.canonical() for row in rows}
    for run in runs:
        assert run.info.artifact_uri.startswith("mlflow-artifacts:")
        path = client.download_artifacts(run.info.run_id, "run.json", str(tmp_path))
        assert json.loads(Path(path).read_text(encoding="utf-8")) == whole[run.data.tags["ssmscale.id"]]
        kept = mlflow_server.root / "mlflow-artifacts"
        assert [*kept.rglob(f"{run.info.run_id}/artifacts/run.json")]


def test_mlflows_clients_write_search_delete_restore_and_download_through_it(
    mlflow_server: Served, tmp_path: Path
) -> None:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param, RunTag, ViewType

    client = MlflowClient(tracking_uri=mlflow_server.address)
    experiment = client.create_experiment("by-hand", tags={"mlflow.note.content": "a note"})
    runs = [client.create_run(experiment, run_name=f"run {number}").info.run_id for number in range(5)]
    metrics = [Metric("loss", 1 / step, step, step) for step in range(1, 1001)]
    for part in (metrics[:800], metrics[800:]):
        client.log_batch(runs[0], part, [Param("lr", "1e-3")], [RunTag("kind", "trunk")])
    client.log_metric(runs[0], "final", 1.0)
    client.log_param(runs[0], "width", 16)
    assert [metric.step for metric in client.get_metric_history(runs[0], "loss")] == [*range(1, 1001)]
    client.delete_tag(runs[0], "kind")
    client.set_tag(runs[0], "other", "x")
    client.set_terminated(runs[0], "KILLED")
    found = client.get_run(runs[0])
    assert (found.info.status, found.data.params) == ("KILLED", {"lr": "1e-3", "width": "16"})
    assert ("kind" in found.data.tags, found.data.tags["other"]) == (False, "x")

    client.delete_run(runs[1])
    pages, token = [], None
    while token is not None or not pages:
        pages.append(client.search_runs([experiment], "", ViewType.ALL, max_results=2, page_token=token))
        token = pages[-1].token or None
    assert sorted(run.info.run_id for page in pages for run in page) == sorted(runs)
    assert [len(page) for page in pages] == [2, 2, 1]
    client.restore_run(runs[1])
    assert len(client.search_runs([experiment])) == 5

    folder = tmp_path / "files" / "of a run"
    folder.mkdir(parents=True)
    (folder / "ünïcode & 50%.bin").write_bytes(bytes(range(256)) * 40_000)  # in several pieces
    client.log_artifacts(runs[0], str(tmp_path / "files"), "sent")
    client.log_text(runs[0], "text", "note.txt")
    assert {file.path for file in client.list_artifacts(runs[0])} == {"note.txt", "sent"}
    there = Path(client.download_artifacts(runs[0], "sent", str(tmp_path)))
    sent, got = ([path.read_bytes() for path in at.rglob("*.bin")] for at in (folder, there))
    assert got == sent

    client.rename_experiment(experiment, "renamed")
    client.set_experiment_tag(experiment, "a", "b")
    client.delete_experiment(experiment)
    client.restore_experiment(experiment)
    restored = client.get_experiment_by_name("renamed")
    assert restored is not None
    assert (restored.lifecycle_stage, restored.tags["a"]) == ("active", "b")
    client.delete_experiment(experiment)


def test_it_listens_on_the_loopback_alone_and_asks_this_machine_for_the_password_too(
    mlflow_server: Served,
) -> None:
    assert mlflow_server.ask() == 401
    assert mlflow_server.ask(login=mlflow_server.login) == 200
    listening = {
        connection.laddr.ip
        for process in mlflow_server.processes()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}
    assert mlflow_server.ask(login=mlflow_server.login, host="attacker.example.org") == 403


def test_a_databases_password_is_shown_nowhere(postgres_server: Served) -> None:
    assert postgres_server.told["database"].startswith("postgresql+psycopg2://mlflow:***@127.0.0.1:")
    processes = [*postgres_server.processes(), psutil.Process(postgres_server.process.pid)]
    lines = [" ".join(process.cmdline()) for process in processes]
    lines += [Path(postgres_server.told["log"]).read_text(encoding="utf-8"), json.dumps(postgres_server.told)]
    assert "harness.tracking.app:create_app" in lines[0]
    for line in lines:
        assert PASSWORD not in line
        assert "a%2Fsecret" not in line


def test_other_machines_must_know_the_password_and_call_the_server_by_its_name(guarded: Served) -> None:
    user, password = guarded.login
    assert guarded.ask() == 401
    assert guarded.ask("/") == 401
    assert guarded.ask("/api/2.0/mlflow-artifacts/artifacts") == 401
    for default in ("password1234", "password", ""):
        assert guarded.ask(login=("admin", default)) == 401
        assert guarded.ask(login=(user, default)) == 401
    assert guarded.ask(login=(user, password)) == 200
    assert guarded.ask(login=(user, password), host="attacker.example.org") == 403
    assert guarded.ask(login=(user, password), host=f"{socket.gethostname()}:{guarded.port}") == 200
    assert guarded.ask(login=(user, password), host="proxy.example.org") == 200


def test_the_password_is_long_and_random_and_its_files_have_one_reader(guarded: Served) -> None:
    folder = guarded.root / "serve"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    files = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir() if path.name != "lock"}
    assert files == {"password": 0o600}
    password = (folder / "password").read_text(encoding="utf-8").strip()
    assert len(password) >= 32
    assert len(set(password)) > 10
    shown = json.dumps(guarded.told) + Path(guarded.told["log"]).read_text(encoding="utf-8")
    shown += "".join(" ".join(process.cmdline()) for process in guarded.processes())
    assert password not in shown


def test_a_tracker_with_the_printed_environment_is_let_in(
    guarded: Served, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from mlflow.exceptions import MlflowException

    address = f"http://127.0.0.1:{guarded.port}"
    root = Root(tmp_path / "runs")
    monkeypatch.delenv("MLFLOW_TRACKING_USERNAME", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD", raising=False)
    with pytest.raises(MlflowException, match="needs a user and a password"):
        assert Tracker(address, "guarded", root).experiment
    for name, value in guarded.clients_environment.items():
        monkeypatch.setenv(name, value)
    assert Tracker(address, "guarded", root).experiment.id


def test_a_second_server_on_one_sqlite_file_is_refused(
    sqlite_server: Served, served_study: Path, ssmscale: Command
) -> None:
    second = ssmscale("serve", served_study, "--root", sqlite_server.root, "--port", 0)
    second.assert_refused(f"{sqlite_server.root}/mlflow.db: another `ssmscale serve` serves it")


def test_the_doctor_finds_out_whether_jobs_could_reach_a_tracker(
    sqlite_server: Served, guarded: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    alone = tracker(sqlite_server.address)
    assert (alone.works, "--host" in str(alone.remedy)) == (False, True)
    own = f"http://{addresses()[-1]}:{guarded.port}"
    refused = tracker(own)  # with the login of the other server
    assert (refused.works, "export MLFLOW_TRACKING_USERNAME" in str(refused.remedy)) == (False, True)
    for name, value in guarded.clients_environment.items():
        monkeypatch.setenv(name, value)
    assert tracker(own).works
    gone = tracker("http://ssmscale:hunter2@127.0.0.2:9/")
    assert not gone.works
    assert "hunter2" not in str(gone)
    assert tracker(None).works


def test_ctrl_c_ends_it_in_order(guarded: Served) -> None:
    held = guarded.processes()
    assert held
    assert guarded.stop(signal.SIGINT) == (0, "stopped\n")
    wait_until(lambda: not any(map(is_running, held)))


def test_a_port_in_use_is_one_sentence(served_study: Path, ssmscale: Command) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        refused = ssmscale("serve", served_study, "--port", port)
    assert refused.status == 2
    assert refused.err == f"error: --port {port}: another program listens there; --port 0 takes a free one\n"
    nowhere = ssmscale("serve", served_study, "--host", "203.0.113.7", "--port", 0)
    nowhere.assert_refused("--host 203.0.113.7: this machine cannot listen there")


@pytest.mark.parametrize(
    ("database", "sentence"),
    [
        ("postgres://u:hush@h/d", "keeps no runs in postgres://; write postgresql://"),
        ("mongodb://u:hush@h/d", "keeps no runs in mongodb://"),
        ("u:hush@h/d", "not a database address"),
        ("postgresql://u:hush@h:port/d", "not a database address"),
        ("postgresql://u:hush@h", "names no database"),
        ("sqlite://", "names no database"),
        ("postgresql://u:hush@127.0.0.1:FREE/d", "cannot be opened: connection to server at"),
    ],
)
def test_a_mistake_in_a_databases_address_is_one_sentence_without_its_password(
    database: str, sentence: str, served_study: Path, ssmscale: Command
) -> None:
    database = database.replace("FREE", str(free_port()))
    refused = ssmscale("serve", served_study, "--database", database, "--port", 0)
    refused.assert_refused(sentence)
    assert refused.err.count("error: ") == 1
    assert "hush" not in refused.err


def test_a_wrong_password_is_said_before_mlflow_tries_for_minutes(
    postgres: Postgres, served_study: Path, ssmscale: Command
) -> None:
    refused = ssmscale(
        "serve", served_study, "--database", postgres.uri.replace("secret", "hush"), "--port", 0
    )
    assert refused.status == 2
    assert 'password authentication failed for user "mlflow"' in refused.err
    assert "hush" not in refused.err


def test_tables_of_another_mlflow_are_named_with_the_command_that_upgrades_them(
    empty_store: Path, served_study: Path, ssmscale: Command, tmp_path: Path
) -> None:
    store = Path(shutil.copy(empty_store, tmp_path))
    with sqlite3.connect(store) as database:
        database.execute("UPDATE alembic_version SET version_num = 'ff01da956556'")
    ssmscale("serve", served_study, "--root", tmp_path, "--port", 0).assert_refused(
        f"run `mlflow db upgrade sqlite:///{store}`"
    )
    store.write_text("this is no database, but it is long enough to be taken for one" * 99)
    broken = ssmscale("serve", served_study, "--root", tmp_path, "--port", 0)
    broken.assert_refused("file is not a database")


def test_a_server_that_never_becomes_healthy_is_reported_with_its_log(
    empty_store: Path,
    served_study: Path,
    ssmscale: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copy(empty_store, tmp_path)
    monkeypatch.setenv("MLFLOW_UVICORN_OPTS", "--no-such-option")
    failed = ssmscale("serve", served_study, "--root", tmp_path, "--port", 0)
    assert (failed.status, failed.out) == (2, "")
    assert failed.err.startswith("error: MLflow's server did not start")
    assert "No such option '--no-such-option'" in failed.err


def test_a_server_that_dies_is_reported_with_the_end_of_its_log(postgres_server: Served) -> None:
    for process in postgres_server.processes():
        process.kill()
    postgres_server.process.wait(PATIENCE)
    status, said = postgres_server.stop()
    assert status == 1
    assert said.startswith("error: MLflow's server ended by itself (status -9); ")
    assert "mlflow-server.log ends:" in said


def test_a_server_whose_command_is_killed_does_not_stay_behind(mlflow_server: Served) -> None:
    held = mlflow_server.processes()  # on PostgreSQL a supervisor and its workers
    assert held
    mlflow_server.stop(signal.SIGKILL)
    wait_until(lambda: not any(map(is_running, held)))
