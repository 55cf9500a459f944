"""Submitting to an existing Ray cluster, cancelling there, and clusters that cannot be used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.dispatch.ray import existing
from harness.dispatch.ray.cluster import RayAddress
from harness.dispatch.ray.host import LOOPBACK
from harness.dispatch.ray.job_server import Seen, SeenNode
from harness.record.journal import read_progress
from harness.record.provenance import installed_version
from harness.record.root import Root, read_model, write_series
from harness.record.scores import HELD_OUT, evaluation_rows
from harness.record.series import untrained
from ssmttm.errors import InputError
from tests.cluster.servers import free_port
from tests.conftest import Command as Verb
from tests.conftest import Write
from tests.harness.journals import read_events, registered
from tests.harness.rays import Here
from tests.harness.trainer import losses, progress_of, series_folder, undisturbed
from tests.studies import Fields, with_iterations
from tests.waiting import PATIENCE, wait_until

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Here]:
    """Start a Ray with a job server, which needs a token."""
    ray = Here(tmp_path_factory.mktemp("ray"), dashboard=True)
    try:
        yield ray
    finally:
        ray.stop()


@pytest.fixture
def command(here: Here, tmp_path: Path) -> Command:
    """The command on an empty ROOT, with the token of that Ray."""
    environment = {**os.environ, **here.address.environment()}
    del environment["RAY_ADDRESS"]

    def run(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "harness", *arguments, "--root", str(tmp_path / "runs")]
        return subprocess.run(
            line, env={**environment, **more}, capture_output=True, text=True, timeout=PATIENCE, check=False
        )

    return run


def test_the_dashboard_is_on_the_loopback_at_the_address_in_ray_json(here: Here) -> None:
    told = here.address
    assert told == read_model(here.folder / "ray.json", RayAddress)
    assert told.dashboard is not None
    port = told.dashboard.rpartition(":")[2]
    assert told.tunnel() == f"ssh -L {port}:127.0.0.1:{port} {told.user}@{told.node}"
    token = told.token_file.read_text().strip()
    assert token not in (here.folder / "ray.json").read_text()
    request = urllib.request.Request(f"{told.dashboard}/api/version")
    request.add_header("Authorization", f"Bearer {token}")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=PATIENCE) as answer:
        assert "ray_version" in json.load(answer)
    assert {host for host, _ in here.listening()} == {LOOPBACK}


def test_a_study_is_handed_to_a_ray_cluster_once_and_told_of_until_it_is_done(
    tmp_path: Path, here: Here, command: Command, ssmscale: Verb, study_fields: Fields, write_study: Write
) -> None:
    root = Root(tmp_path / "runs")
    to_ray = ("--on", "ray", "--ray-address", str(here.address.dashboard))
    (*_, point) = registered(root, study_fields).points
    series = write_series(root, point.run)
    with untrained(series):  # the job waits for what holds the series until the second study has joined it
        done = command("submit", str(write_study(study_fields)), *to_ray, "--then", "evaluate")
        others = {**with_iterations(study_fields, 5, 15), "name": "other"}
        joined = command("submit", str(write_study(others)), *to_ray)
        study = str(write_study(study_fields))
        again = command("submit", study, *to_ray)
    assert done.returncode == 0, done.stderr
    assert (
        f"2 runs in 1 series submitted to Ray at {here.address.dashboard}: Ray job ssmscale-" in done.stdout
    )
    assert "1 task submitted to Ray" in done.stderr
    assert "nothing of tiny is left" in again.stdout
    (array,) = (root.study("tiny") / "arrays").glob("*.json")
    assert f"2 runs join job {array.stem} of study tiny, which trains their trunk" in joined.stdout
    assert "2 done" in command("status", "other", "--watch").stdout
    assert losses(root, others) == pytest.approx(undisturbed(others), abs=1e-6)

    wait_until(lambda: all(told.state == "finished" for told in progress_of(root, study_fields)))
    status = json.loads(command("status", "tiny", "--json").stdout)
    assert status["counts"] == {"done": 2}
    assert losses(root, study_fields) == pytest.approx(undisturbed(study_fields), abs=1e-6)
    (started, *_) = [event for event in read_events(series_folder(root)) if event["event"] == "started"]
    assert (started["dispatcher"], started["job_id"]) == ("ray", array.stem)
    assert "controller" in ssmscale("logs", "tiny", status["runs"][0]["run_id"], "--root", root.path).out
    resolved = registered(root, study_fields)
    wait_until(
        lambda: len({row.run_id for row in evaluation_rows(resolved) if row.settings != HELD_OUT}) == 2
    )
    (part,) = (root.study("tiny") / "evaluate" / "parts").iterdir()
    (began,) = [event for event in read_events(part) if event["event"] == "started"]
    assert began["t"] >= max(event["t"] for event in read_events(series_folder(root)))


def test_nothing_is_written_before_a_dry_run_is_taken_back_or_many_hours_are_confirmed(
    tmp_path: Path,
    ssmscale: Verb,
    study_fields: Fields,
    write_study: Write,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(existing, "RayJobs", str)
    monkeypatch.setattr(existing, "_inspect", lambda *_: seen())
    study_fields["grid"]["iterations"] = [10**9]
    to_ray = ("submit", write_study(study_fields), "--on", "ray", "--ray-address", "http://h:1")
    assert "1 run in 1 series packed on Ray at http://h:1" in ssmscale(*to_ray, "--dry-run").out
    ssmscale(*to_ray).assert_refused("GPU-hours to Ray at http://h:1: more than confirm_gpu_hours, 100")
    assert not (tmp_path / "runs").exists()


@pytest.mark.verify
def test_cancelling_all_ends_the_ray_job_after_its_workers_have_saved(
    tmp_path: Path, here: Here, command: Command, study_fields: Fields, write_study: Write
) -> None:
    study_fields["grid"]["iterations"] = [100_000]
    study = str(write_study(study_fields))
    done = command("submit", study, "--on", "ray", RAY_ADDRESS=here.address.address)
    assert done.returncode == 0, done.stderr
    assert f"to the Ray cluster at {here.address.address}, as RAY_ADDRESS says" in done.stderr

    def row() -> Any:
        return json.loads(command("status", "tiny", "--json").stdout)["runs"][0]

    wait_until(lambda: read_progress(series_folder(Root(tmp_path / "runs"))).step > 0)
    assert row()["state"] == "running"
    assert "1 job taken from Ray: ssmscale-" in command("cancel", "tiny").stdout
    wait_until(lambda: row()["slurm_state"] in {"STOPPED", "SUCCEEDED"})
    assert row()["state"] == "cancelled"


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("http://127.0.0.1:{closed}", "nothing answers there"),
        ("ray://127.0.0.1:{closed}", "nothing answers there"),
        ("127.0.0.1:{closed}", "nothing answers there"),
        ("ftp://head:1", "is not an address of a Ray cluster"),
    ],
    ids=["http", "ray", "gcs", "ftp"],
)
def test_a_cluster_that_cannot_be_used_is_refused_in_a_sentence_before_anything_is_written(
    tmp_path: Path, ssmscale: Verb, study_fields: Fields, write_study: Write, address: str, problem: str
) -> None:
    address = address.format(closed=free_port())
    said = ssmscale("submit", write_study(study_fields), "--on", "ray", "--ray-address", address)
    said.assert_refused(f"error: --ray-address {address}: {problem}")
    assert not (tmp_path / "runs").exists()


def test_a_wrong_token_is_refused_in_a_sentence_before_anything_is_written(
    tmp_path: Path, here: Here, command: Command, study_fields: Fields, write_study: Write
) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text("f" * 64)
    to_ray = ("submit", str(write_study(study_fields)), "--on", "ray", "--ray-address")
    done = command(*to_ray, str(here.address.dashboard), RAY_AUTH_TOKEN_PATH=str(wrong))
    assert done.returncode == 2
    assert f"error: --ray-address {here.address.dashboard}: refuses the token in" in done.stderr
    assert not (tmp_path / "runs" / "studies").exists()


def node(**facts: Any) -> SeenNode:
    return SeenNode.model_validate({"name": "n1", "cores": 8, "gpus": 0, "memory_gib": 16.0, **facts})


def seen(*nodes: SeenNode, **facts: Any) -> Seen:
    """Return what an inspection finds, by default one node that can be used."""
    usual = {"ray": "2.60.0", "python": "3.11.7", "ssmscale": installed_version("ssmscale")}
    return Seen.model_validate({**usual, "nodes": nodes or (node(),), **facts})


def test_a_cluster_is_planned_for_by_its_nodes_with_gpus_each_as_its_weakest() -> None:
    nodes = (node(), node(gpus=4, gpu_type="A100", gpu_memory_gib=80.0), node(gpus=8, gpu_memory_gib=40.0))
    cluster = existing.cluster_of("http://h:1", seen(*nodes))
    assert (cluster.nodes, cluster.gpus, cluster.gpu_memory_gib, cluster.gpu_type) == (2, 4, 40.0, None)


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        (seen(ssmscale="99"), "has ssmscale 99"),
        (seen(ray="2.40.1"), "runs Ray 2.40.1; 2.60 or later is needed"),
        (seen(node(hidden=("/corpus",))), "corpus.path: /corpus: node n1 of Ray"),
        (seen(node(), node(name="n2", hidden=("/runs/.seen",))), "--root: /runs: node n2 of Ray"),
    ],
    ids=["ssmscale", "ray", "corpus", "root"],
)
def test_a_cluster_that_does_not_fit_is_refused_with_the_reason(found: Seen, problem: str) -> None:
    with pytest.raises(InputError) as raised:
        existing.check_seen("http://h:1", found, {"--root": Path("/runs"), "corpus.path": Path("/corpus")})
    assert problem in str(raised.value)
