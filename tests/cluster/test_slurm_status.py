"""`status` on a real SLURM, with accounts and on a cluster that keeps none."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.dispatch.slurm.queue import read_jobs
from harness.record.jobs import JobState
from harness.record.registry import resolve_registered
from harness.submit.monitor import StudyMonitor
from slurm.devcluster.cluster import DevCluster, Shape
from tests.cluster.conftest import started
from tests.cluster.slurm_study import SlurmStudy, held_back
from tests.programs import count_calls
from tests.studies import Fields
from tests.waiting import wait_until

pytestmark = pytest.mark.cluster


@pytest.fixture
def without_accounts(tmp_path: Path) -> Iterator[DevCluster]:
    """A SLURM without accounts, where sacct answers with an error."""
    yield from started(DevCluster(tmp_path / "cluster", Shape(nodes=1, accounting=False)))


def test_without_accounts_a_study_is_followed_cancelled_and_tried_again(
    without_accounts: DevCluster, study_fields: Fields, tmp_path: Path
) -> None:
    study = SlurmStudy(without_accounts, tmp_path / "study", study_fields)
    study.slurm("scontrol", "update", "partitionname=low", "state=down")
    study.submit()
    told = study.status()
    assert told["counts"] == {"queued": 2}
    assert {run["reason"] for run in told["runs"]} == {"PartitionDown (its partition is down)"}
    assert (told["gpu_hours"]["used"], told["gpu_hours"]["left_unknown_runs"]) == (0, 2)

    study.run("cancel")
    assert study.queue() == []
    assert f"on slurm, cluster {study.profile_path}, as in the last submission" in study.run("retry")
    assert len(study.queue()) == 1
    study.slurm("scontrol", "update", "partitionname=low", "state=up")
    watched = study.run("status", "--watch")
    assert "2 done" in watched
    told = study.status()
    assert told["counts"] == {"done": 2}
    assert told["gpu_hours"]["used"] > 0 == told["gpu_hours"]["left"]

    said = study.run("logs", told["runs"][0]["run_id"])
    first, second = said.index("SLURM's log of job"), said.index("worker, rank 0")
    assert first < said.index("1 ranks on n1") < second < said.index("held-out loss")


def test_accounts_count_every_start_of_a_job(
    devcluster: DevCluster, study_fields: Fields, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = SlurmStudy(devcluster, tmp_path, study_fields)
    monkeypatch.setenv("SLURM_CONF", devcluster.env["SLURM_CONF"])
    stop = tmp_path / "stop"
    script = f"until [ -e '{stop}' ]; do sleep 0.2; done"
    options = ["--parsable", "--requeue", "--output=/dev/null", "--job-name=twice", "--array=0"]
    job_id = study.slurm("sbatch", *options, "--wrap", script).strip() + "_0"

    def seen() -> Any:
        return read_jobs(["twice"], time.time()).get(job_id)

    try:
        wait_until(lambda: seen() is not None and seen().seconds >= 2)
        study.slurm("scontrol", "requeue", job_id)
        wait_until(lambda: seen().state is JobState.RUNNING and seen().seconds >= 1)
        stop.touch()
        wait_until(lambda: seen().state is JobState.ENDED)
        wait_until(lambda: (seen().accounted_seconds or 0) >= seen().seconds + 2)
    finally:
        stop.touch()
        study.slurm("scancel", "--user=root")  # SLURM refuses the number of a job that it has forgotten


def test_readings_within_a_short_time_ask_slurm_once(
    devcluster: DevCluster, study_fields: Fields, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = SlurmStudy(devcluster, tmp_path / "study", study_fields)
    told = tmp_path / "told"
    count_calls(tmp_path / "bin", told, "squeue", "sacct")
    with held_back(study.slurm):
        study.submit()
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setenv("SLURM_CONF", devcluster.env["SLURM_CONF"])
        resolved = resolve_registered(study.root, "tiny")
        assert resolved is not None
        reader = StudyMonitor(resolved)
        for _ in range(3):
            assert reader.read().counts == {"queued": 2}
        assert sorted(told.read_text().split()) == ["sacct", "squeue"]
        study.run("cancel")
