"""A mirror beside a worker, against MLflow's real server: it shows training as it goes on, and how it ended."""

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
from tests.cluster.slurm_study import Make, wake
from tests.harness import tracked
from tests.harness.faults import check_mirrored
from tests.harness.journals import registered
from tests.harness.trainer import prepared
from tests.studies import Fields
from tests.waiting import PATIENCE, paced, wait_until

pytestmark = pytest.mark.cluster


class Mirrored:
    """A study in MLflow."""

    def __init__(self, server: Served, study: str) -> None:
        self.address, self.study = server.address, study

    def runs(self) -> dict[str, Any]:
        """Return MLflow's runs by the ids of Series and Runs."""
        return {run.data.tags["ssmscale.id"]: run for run in tracked.mlflow_runs(self.address, self.study)}

    def status(self, identity: str) -> str | None:
        """Return MLflow's status of a Series or Run, if it is there."""
        found = self.runs().get(identity)
        return found.info.status if found else None

    def shows(self, series: Path) -> bool:
        """True if MLflow has a Series running, and its newest loss."""
        steps = read_progress(series).steps
        run = self.runs().get(series.name)
        return (
            run is not None
            and run.info.status == "RUNNING"
            and run.data.metrics.get("train_loss") == steps[max(steps)]["loss"]
        )


def test_jobs_on_nodes_are_in_mlflow_while_they_train_and_no_sync_is_needed(
    make: Make, study_fields: Fields, sqlite_server: Served
) -> None:
    study_fields |= {"name": "nodes", "tracking": {"log_every": 1, "uri": sqlite_server.address}}
    study_fields["grid"] |= {"seeds": [0, 1], "iterations": [10, 200]}
    study = make(study_fields)
    study.step_seconds = 0.02
    study.submit()
    held = study.hold(dict.fromkeys(study.tasks(), 20))
    mirrored = Mirrored(sqlite_server, "nodes")
    wait_until(lambda: all(map(mirrored.shows, held)))
    wake(*(process for processes in held.values() for process in processes))
    study.wait_until_over()
    folders = study.journals()
    assert len(folders) == 6
    # The last round of a mirror may be late.
    wait_until(lambda: all(mirrored.status(folder.name) == "FINISHED" for folder in folders))
    check_mirrored(sqlite_server.address, "nodes", folders)
    runs = mirrored.runs()
    for folder in study.root.path.glob("runs/*"):
        result = read_progress(folder).result
        assert result is not None
        assert runs[folder.name].data.metrics["final.loss"] == result["loss"]


def test_a_worker_that_is_killed_is_called_killed_by_its_mirror(
    tmp_path: Path, study_fields: Fields, sqlite_server: Served
) -> None:
    root, study_fields["name"] = Root(tmp_path / "runs"), "killed"
    study_fields["grid"]["iterations"] = [100_000]
    (point,) = registered(root, study_fields).points
    prepared(root, study_fields, tracking=sqlite_server.address)
    mirrored = Mirrored(sqlite_server, "killed")
    worker = subprocess.Popen(
        [sys.executable, "-m", "harness.train.worker", str(root.run(point.run.run_id))],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**paced(0.05), "OMP_NUM_THREADS": "1"},
    )
    try:
        wait_until(lambda: mirrored.status(point.series_id))
        assert mirrored.status(point.series_id) == "RUNNING"
    finally:
        worker.send_signal(signal.SIGKILL)
        worker.wait(PATIENCE)
    wait_until(lambda: mirrored.status(point.series_id) == "KILLED")
    assert "no process trains it" in mirrored.runs()[point.series_id].data.tags["ssmscale.reason"]
