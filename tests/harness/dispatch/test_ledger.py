"""Arrays and leases that change while SLURM is asked: none is lost, and none is submitted twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.dispatch import ledger
from harness.dispatch.arrays import ArrayStore, new_array
from harness.dispatch.base import Task
from harness.dispatch.ledger import jobs_of_runs, open_ledger
from harness.record.root import Root
from harness.submit.leases import Lease, Leases, acquire
from tests.harness.conftest import SAY_WHO, Answering
from tests.harness.dispatch.fakes import SMALL

SERIES = "0123456789abcdef"


def record(
    study_dir: Path, process: dict[str, Any], name: str = "ssmscale-a", age: float = 60, **more: Any
) -> Path:
    """Record an array of one task as its submission does; returns the file."""
    store, task = ArrayStore(study_dir), Task(series_id=SERIES, run_dirs=(Path("/nowhere/runs/a"),))
    made = new_array(name, SMALL, [task], **more)
    array = made.model_copy(update={"process": process, "t": time.time() - age})
    store.write(array)
    return store.path_of(array)


def test_an_array_that_was_never_submitted_is_void(
    tmp_path: Path, answering: Answering, gone: dict[str, Any]
) -> None:
    record(tmp_path, gone)
    assert open_ledger(tmp_path).arrays["ssmscale-a"].is_void
    assert ArrayStore(tmp_path).read()["ssmscale-a"].is_void


def test_a_number_recorded_while_slurm_is_asked_stays(
    tmp_path: Path, answering: Answering, gone: dict[str, Any]
) -> None:
    recorded = record(tmp_path, gone, job_id="77").rename(tmp_path / "later")
    answering(first=f"mv '{recorded}' '{record(tmp_path, gone)}'")
    assert open_ledger(tmp_path).arrays["ssmscale-a"].job_id == "77"
    assert ArrayStore(tmp_path).read()["ssmscale-a"].job_id == "77"


def test_a_submission_that_ends_while_slurm_is_asked_is_given_up_the_next_time(
    tmp_path: Path, answering: Answering
) -> None:
    command = [sys.executable, "-c", f"{SAY_WHO}; input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as submission:
        assert submission.stdout is not None
        record(tmp_path, json.loads(submission.stdout.readline()))
        ended = f"until grep -q '^State:.Z' /proc/{submission.pid}/status; do :; done"
        answering(first=f"kill {submission.pid}; {ended}")
        assert open_ledger(tmp_path).holds("ssmscale-a", SERIES)
        answering()
        assert not open_ledger(tmp_path).holds("ssmscale-a", SERIES)


def test_slurm_is_asked_only_some_time_after_a_submission_was_killed(
    tmp_path: Path, answering: Answering, gone: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "ORPHAN_SECONDS", 0.5)
    record(tmp_path, gone, age=0)
    answering(first=f"date +%s.%N >'{tmp_path}/asked'")
    (array,) = open_ledger(tmp_path).arrays.values()
    assert float((tmp_path / "asked").read_text()) >= array.t + 0.5


def test_a_job_of_a_void_array_ends_at_once(tmp_path: Path, gone: dict[str, Any]) -> None:
    file = record(tmp_path, gone, is_void=True)
    done = subprocess.run(
        [sys.executable, "-m", "harness.dispatch.slurm.job", str(file)],
        env={**os.environ, "SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_JOB_ID": "77"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "given up" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["arrays"]


def lease_of(array: str, process: dict[str, Any], study: str = "s") -> Lease:
    return Lease(study=study, array=array, process=process, t=time.time() - 60)


def test_a_series_submitted_after_the_ledger_was_read_is_not_submitted_again(
    tmp_path: Path, answering: Answering, gone: dict[str, Any]
) -> None:
    root = Root(tmp_path / "runs")
    root.series(SERIES).mkdir(parents=True)
    leases = Leases(root)
    root.series("other").mkdir()
    acquire(root.series("other"), lease_of("ssmscale-old", gone))  # of an array that was never recorded
    assert leases.take("other", lease_of("ssmscale-new", gone))  # reads the ledger
    acquire(root.series(SERIES), lease_of("ssmscale-b", gone))
    record(root.study("s"), gone, "ssmscale-b", job_id="77")
    answering("77_0|ssmscale-b|PENDING|0:00||Priority")
    assert not leases.take(SERIES, lease_of("ssmscale-new", gone))


def test_an_array_of_another_cluster_is_held_there_whatever_this_one_answers_about_its_number(
    tmp_path: Path, answering: Answering, at_cluster: Callable[[str], None], gone: dict[str, Any]
) -> None:
    root = Root(tmp_path / "runs")
    folder = root.study("theirs")
    record(folder, gone, job_id="77", slurm_cluster="alpha")
    answering("77_0|ssmscale-a|COMPLETED|5:00|n1|None")
    at_cluster("alpha")
    assert not open_ledger(folder).holds("ssmscale-a", SERIES)
    at_cluster("beta")
    found = open_ledger(folder)
    assert found.elsewhere == {"ssmscale-a": "alpha"}
    assert found.holds("ssmscale-a", SERIES)
    (view,) = jobs_of_runs(found).values()
    assert (view.state, view.job_id) == ("queued", "77")
    assert view.reason == "held by SLURM cluster alpha, which cannot be asked from here"
    root.series(SERIES).mkdir(parents=True)
    acquire(root.series(SERIES), lease_of("ssmscale-a", gone, "theirs"))
    mine = lease_of("ssmscale-b", gone, "mine")
    assert not Leases(root).take(SERIES, mine)
    at_cluster("alpha")
    assert Leases(root).take(SERIES, mine)


def test_records_of_former_versions_are_read(
    tmp_path: Path, answering: Answering, gone: dict[str, Any]
) -> None:
    path = record(tmp_path, gone, job_id="77")
    fields = json.loads(path.read_text())
    del fields["slurm_cluster"]
    fields["tasks"][0]["architecture"] = "prefix_simba"
    path.write_text(json.dumps(fields))
    answering("77_0|ssmscale-a|RUNNING|5:00|n1|None")
    assert open_ledger(tmp_path).holds("ssmscale-a", SERIES)
