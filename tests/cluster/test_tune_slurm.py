"""Tuning on a real SLURM: trials are jobs, which outlive the process that controls the search."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from typing import Any

import pytest

from harness.journal import Event, attempts, read_progress
from tests.cluster.servers import wait_until
from tests.cluster.slurm_study import Make, SlurmStudy

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


def start_tune(study: SlurmStudy) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "harness", "tune", str(study.study), "--json"),
            *("--on", "slurm", "--cluster", str(study.profile_path), "--root", str(study.root.path)),
        ],
        cwd=study.code,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=study.environment,
    )


def test_a_search_whose_controller_was_killed_finds_its_jobs_again(
    make: Make, study_fields: dict[str, Any]
) -> None:
    study_fields["grid"]["iterations"] = [30]
    study_fields["tune"] = {
        "sizes": ["xs"],
        "trials": 4,
        "parallel": 2,
        "search": {"optimiser.lr": {"low": 1e-3, "high": 1e-1, "log": True}},
    }
    study = make(study_fields)
    runs = study.root.path / "runs"
    first = start_tune(study)
    try:
        wait_until(lambda: any(read_progress(run).state == Event.FINISHED for run in runs.glob("*")), 180)
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    out, err = start_tune(study).communicate(timeout=300)
    (cell,) = json.loads(out)["cells"]
    assert cell["trials"] == {"finished": 4}, err
    assert [attempts(run) for run in runs.glob("*")] == [[1]] * 4  # none was trained, or begun, twice
    assert len(list((study.root.study("tiny/tune") / "arrays").glob("*.json"))) == 4
