"""Submitting to an existing Ray cluster, cancelling there, and clusters that cannot be used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.dispatch.ray.existing import check_seen, cluster_of
from harness.dispatch.ray.job_server import Seen, SeenNode
from harness.record.journal import read_progress
from harness.record.provenance import installed_version
from harness.record.root import Root
from ssmttm.errors import InputError
from tests.cluster.servers import free_port
from tests.harness.journals import read_events
from tests.harness.rays import Here
from tests.harness.trainer import losses, progress_of, series_folder, undisturbed
from tests.waiting import PATIENCE, wait_until

Fields = dict[str, Any]
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


def test_a_study_is_handed_to_a_ray_cluster_once_and_told_of_until_it_is_done(
    tmp_path: Path, here: Here, command: Command, study_fields: Fields, write_study: Callable[..., Path]
) -> None:
    study = str(write_study(study_fields))
    to_ray = ("submit", study, "--on", "ray", "--ray-address", str(here.address.dashboard))
    done = command(*to_ray)
    assert done.returncode == 0, done.stderr
    assert (
        f"2 runs in 1 series submitted to Ray at {here.address.dashboard}: Ray job ssmscale-" in done.stdout
    )
    again = command(*to_ray)
    assert "1 series left to another submission" in again.stdout or "nothing of tiny is left" in again.stdout

    root = Root(tmp_path / "runs")
    wait_until(lambda: all(told.state == "finished" for told in progress_of(root, study_fields)))
    status = json.loads(command("status", "tiny", "--json").stdout)
    assert status["counts"] == {"done": 2}
    assert losses(root, study_fields) == pytest.approx(undisturbed(study_fields), abs=1e-6)
    (array,) = (root.study("tiny") / "arrays").glob("*.json")
    (started,) = [event for event in read_events(series_folder(root)) if event["event"] == "started"]
    assert (started["dispatcher"], started["job_id"]) == ("ray", array.stem)
    assert "controller" in command("logs", "tiny", status["runs"][0]["run_id"]).stdout


def test_nothing_is_written_before_a_dry_run_is_taken_back_or_many_hours_are_confirmed(
    tmp_path: Path, here: Here, command: Command, study_fields: Fields, write_study: Callable[..., Path]
) -> None:
    study_fields["grid"]["iterations"] = [10**9]
    to_ray = (
        "submit",
        str(write_study(study_fields)),
        "--on",
        "ray",
        "--ray-address",
        here.address.dashboard,
    )
    done = command(*map(str, to_ray), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "1 run in 1 series packed on Ray at" in done.stdout
    assert not (tmp_path / "runs").exists()
    done = command(*map(str, to_ray))
    assert done.returncode == 2
    told = " ".join(done.stderr.split())
    assert f"GPU-hours to Ray at {here.address.dashboard}: more than confirm_gpu_hours, 100" in told
    assert not (tmp_path / "runs").exists()


@pytest.mark.verify
def test_cancelling_all_ends_the_ray_job_after_its_workers_have_saved(
    tmp_path: Path, here: Here, command: Command, study_fields: Fields, write_study: Callable[..., Path]
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
        ("{dashboard}", "refuses the token in"),
    ],
    ids=["http", "ray", "gcs", "ftp", "token"],
)
def test_a_cluster_that_cannot_be_used_is_refused_in_a_sentence_before_anything_is_written(
    tmp_path: Path,
    here: Here,
    command: Command,
    study_fields: Fields,
    write_study: Callable[..., Path],
    address: str,
    problem: str,
) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text("f" * 64)
    address = address.format(closed=free_port(), dashboard=here.address.dashboard)
    done = command(
        *("submit", str(write_study(study_fields)), "--on", "ray", "--ray-address", address),
        RAY_AUTH_TOKEN_PATH=str(wrong),
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: --ray-address {address}: ")
    assert problem in done.stderr.replace("\n", " ")
    assert not (tmp_path / "runs" / "studies").exists()


def node(**facts: Any) -> SeenNode:
    return SeenNode.model_validate({"name": "n1", "cores": 8, "gpus": 0, "memory_gib": 16.0, **facts})


def test_a_cluster_is_planned_for_by_its_nodes_with_gpus_each_as_its_weakest() -> None:
    nodes = (node(), node(gpus=4, gpu_type="A100", gpu_memory_gib=80.0), node(gpus=8, gpu_memory_gib=40.0))
    cluster = cluster_of("http://h:1", Seen(ray="2.60.0", python="3.11", ssmscale="0", nodes=nodes))
    assert (cluster.nodes, cluster.gpus, cluster.gpu_memory_gib, cluster.gpu_type) == (2, 4, 40.0, None)


@pytest.mark.parametrize(
    ("seen", "problem"),
    [
        ({"ssmscale": "99"}, "has ssmscale 99"),
        ({"ray": "2.40.1"}, "runs Ray 2.40.1; 2.60 or later is needed"),
        ({"nodes": (node(hidden=("/corpus",)),)}, "corpus.path: /corpus: node n1 of Ray"),
        ({"nodes": (node(), node(name="n2", hidden=("/runs/.seen",)))}, "--root: /runs: node n2 of Ray"),
    ],
    ids=["ssmscale", "ray", "corpus", "root"],
)
def test_a_cluster_that_does_not_fit_is_refused_with_the_reason(seen: dict[str, Any], problem: str) -> None:
    facts = {
        "ray": "2.60.0",
        "python": "3.11.7",
        "ssmscale": installed_version("ssmscale"),
        "nodes": (node(),),
    }
    with pytest.raises(InputError) as raised:
        check_seen("http://h:1", Seen.model_validate({**facts, **seen}), Path("/runs"), Path("/corpus"))
    assert problem in str(raised.value)
