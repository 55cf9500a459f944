"""A mirror beside a worker, against MLflow's real server: what it shows while training goes on, and how it ends."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harness.record.journal import read_progress
from harness.record.root import Root
from tests.cluster.servers import Served
from tests.cluster.slurm_study import Make
from tests.harness import tracked
from tests.harness.faults import check_mirrored
from tests.harness.journals import registered
from tests.harness.trainer import prepared, train
from tests.studies import Fields
from tests.waiting import PATIENCE, paced, wait_until

pytestmark = pytest.mark.cluster


def test_jobs_on_nodes_are_in_mlflow_while_they_train_and_no_sync_is_needed(
    make: Make, study_fields: Fields, sqlite_server: Served
) -> None:
    study_fields |= {"name": "nodes", "tracking": {"log_every": 1, "uri": sqlite_server.address}}
    study_fields["grid"] |= {"seeds": [0, 1], "iterations": [10, 200]}
    study = make(study_fields)
    study.step_seconds = 0.02
    study.submit()
    held = study.hold(dict.fromkeys(study.tasks(), 20))

    def everything_told_is_there() -> bool:
        runs = mlflow_runs(sqlite_server.address, "nodes")
        return all(
            series.name in runs
            and runs[series.name].info.status == "RUNNING"
            and runs[series.name].data.metrics.get("train_loss") == newest_loss(series)
            for series in held
        )

    wait_until(everything_told_is_there)
    for process in [process for processes in held.values() for process in processes]:
        process.resume()
    study.wait_until_over()
    folders = study.journals()
    assert len(folders) == 6

    def all_are_over() -> bool:  # the last round of a mirror may be late
        runs = mlflow_runs(sqlite_server.address, "nodes")
        return all(folder.name in runs and runs[folder.name].info.status == "FINISHED" for folder in folders)

    wait_until(all_are_over)
    check_mirrored(sqlite_server.address, "nodes", folders)


def newest_loss(folder: Path) -> float:
    steps = read_progress(folder).steps
    return float(steps[max(steps)]["loss"])


def mlflow_runs(address: str, study: str) -> dict[str, Any]:
    return {run.data.tags["ssmscale.id"]: run for run in tracked.mlflow_runs(address, study)}


def test_a_worker_started_elsewhere_is_mirrored_by_its_own_machine(
    tmp_path: Path, study_fields: Fields, sqlite_server: Served
) -> None:
    root, study_fields["name"] = Root(tmp_path / "runs"), "beside"
    points = registered(root, study_fields).points
    assert train(root, study_fields, tracking=sqlite_server.address) == ["finished"]
    told = {run.run_id: read_progress(root.run(run.run_id)) for run in (point.run for point in points)}
    wait_until(lambda: len(mlflow_runs(sqlite_server.address, "beside")) == 3)  # its last round may be late
    wait_until(
        lambda: (
            {run.info.status for run in mlflow_runs(sqlite_server.address, "beside").values()} == {"FINISHED"}
        )
    )
    held = mlflow_runs(sqlite_server.address, "beside")
    for run_id, progress in told.items():
        assert progress.result is not None
        assert held[run_id].data.metrics["final.loss"] == progress.result["loss"]


def test_a_worker_that_is_killed_is_called_killed_by_its_mirror(
    tmp_path: Path, study_fields: Fields, sqlite_server: Served
) -> None:
    root, study_fields["name"] = Root(tmp_path / "runs"), "killed"
    study_fields["grid"]["iterations"] = [100_000]
    (point,) = registered(root, study_fields).points
    prepared(root, study_fields, tracking=sqlite_server.address)
    worker = subprocess.Popen(
        [sys.executable, "-m", "harness.train.worker", str(root.run(point.run.run_id))],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**paced(0.05), "OMP_NUM_THREADS": "1"},
    )
    try:
        wait_until(lambda: point.run.series_id in mlflow_runs(sqlite_server.address, "killed"))
        assert mlflow_runs(sqlite_server.address, "killed")[point.run.series_id].info.status == "RUNNING"
    finally:
        worker.send_signal(signal.SIGKILL)
        worker.wait(PATIENCE)
    wait_until(
        lambda: mlflow_runs(sqlite_server.address, "killed")[point.run.series_id].info.status == "KILLED"
    )
    reason = mlflow_runs(sqlite_server.address, "killed")[point.run.series_id].data.tags["ssmscale.reason"]
    assert "no process trains it" in reason
