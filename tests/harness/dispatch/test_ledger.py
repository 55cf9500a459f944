"""What becomes of arrays and leases that change while SLURM is asked: nothing is lost, nothing submitted twice."""

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
from harness.dispatch.arrays import Array, ArrayStore
from harness.dispatch.base import Task
from harness.dispatch.ledger import jobs_of_runs, open_ledger
from harness.plan.allocation import Shape
from harness.record.root import Root
from harness.submit.leases import Lease, Leases, acquire
from tests.harness.conftest import SAY_WHO, Answering

SERIES = "0123456789abcdef"


def array_of(name: str, process: dict[str, Any], job_id: str | None = None, age: float = 60) -> Array:
    return Array(
        name=name,
        shape=Shape(nodes=1, ranks=1, threads=1, memory_gib=1),
        tasks=(Task(series_id=SERIES, run_dirs=(Path("/nowhere/runs/a"),)),),
        process=process,
        t=time.time() - age,
        job_id=job_id,
    )


def test_an_array_nobody_submitted_is_void(
    tmp_path: Path, answering: Answering, gone: dict[str, Any]
) -> None:
    ArrayStore(tmp_path).write(array_of("ssmscale-a", gone))
    assert open_ledger(tmp_path).arrays["ssmscale-a"].is_void
    assert ArrayStore(tmp_path).read()["ssmscale-a"].is_void


def test_a_number_written_down_while_slurm_is_asked_stays(
    tmp_path: Path, answering: Answering, gone: dict[str, Any]
) -> None:
    store = ArrayStore(tmp_path)
    store.write(array_of("ssmscale-a", gone, job_id="77"))
    answered = store.folder / "ssmscale-a.json"
    answered.rename(tmp_path / "later")
    store.write(array_of("ssmscale-a", gone))
    answering(first=f"mv '{tmp_path}/later' '{answered}'")
    assert open_ledger(tmp_path).arrays["ssmscale-a"].job_id == "77"
    assert store.read()["ssmscale-a"].job_id == "77"


def test_a_submission_that_ends_while_slurm_is_asked_is_judged_the_next_time(
    tmp_path: Path, answering: Answering
) -> None:
    command = [sys.executable, "-c", f"{SAY_WHO}; input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as submission:
        assert submission.stdout is not None
        ArrayStore(tmp_path).write(array_of("ssmscale-a", json.loads(submission.stdout.readline())))
        ended = f"until grep -q '^State:.Z' /proc/{submission.pid}/status; do :; done"
        answering(first=f"kill {submission.pid}; {ended}")
        assert open_ledger(tmp_path).holds("ssmscale-a", SERIES)
        answering()
        assert not open_ledger(tmp_path).holds("ssmscale-a", SERIES)


def test_slurm_is_given_time_to_hear_of_an_array_whose_submission_was_killed(
    tmp_path: Path, answering: Answering, gone: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "ORPHAN_SECONDS", 0.5)
    array = array_of("ssmscale-a", gone, age=0)
    ArrayStore(tmp_path).write(array)
    answering(first=f"date +%s.%N >'{tmp_path}/asked'")
    open_ledger(tmp_path)
    assert float((tmp_path / "asked").read_text()) >= array.t + 0.5


def test_a_job_of_an_array_found_void_leaves_at_once(tmp_path: Path, gone: dict[str, Any]) -> None:
    store = ArrayStore(tmp_path)
    store.write(array_of("ssmscale-a", gone).model_copy(update={"is_void": True}))
    done = subprocess.run(
        [sys.executable, "-m", "harness.dispatch.slurm.job", str(store.folder / "ssmscale-a.json")],
        env={**os.environ, "SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_JOB_ID": "77"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "given up" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["arrays"]


def test_a_series_submitted_since_the_book_was_read_is_not_submitted_again(
    tmp_path: Path, answering: Answering, gone: dict[str, Any]
) -> None:
    root = Root(tmp_path / "runs")
    root.series(SERIES).mkdir(parents=True)
    leases = Leases(root)
    root.series("other").mkdir()
    acquire(root.series("other"), lease_of("ssmscale-old", gone))
    assert leases.take("other", lease_of("ssmscale-new", gone))  # reads the Ledger
    acquire(root.series(SERIES), lease_of("ssmscale-b", gone))
    ArrayStore(root.study("s")).write(array_of("ssmscale-b", gone, job_id="77"))
    answering("77_0|ssmscale-b|PENDING|0:00||Priority")
    assert not leases.take(SERIES, lease_of("ssmscale-new", gone))


def test_a_lease_for_an_array_that_never_was_is_over(
    tmp_path: Path, answering: Answering, gone: dict[str, Any]
) -> None:
    root = Root(tmp_path / "runs")
    root.series(SERIES).mkdir(parents=True)
    acquire(root.series(SERIES), lease_of("ssmscale-a", gone))
    assert Leases(root).take(SERIES, lease_of("ssmscale-b", gone))


def lease_of(array: str, process: dict[str, Any]) -> Lease:
    return Lease(study="s", array=array, process=process, t=time.time() - 60)


def test_what_another_cluster_was_given_is_held_there_whatever_this_one_says_of_its_number(
    tmp_path: Path, answering: Answering, at_cluster: Callable[[str], None], gone: dict[str, Any]
) -> None:
    store, root = ArrayStore(tmp_path / "runs" / "studies" / "theirs"), Root(tmp_path / "runs")
    array = array_of("ssmscale-a", gone, job_id="77").model_copy(update={"slurm_cluster": "alpha"})
    store.write(array)
    answering("77_0|ssmscale-a|COMPLETED|5:00|n1|None")
    at_cluster("alpha")
    found = open_ledger(store.folder.parent)
    assert not found.holds("ssmscale-a", SERIES)
    at_cluster("beta")
    found = open_ledger(store.folder.parent)
    assert found.elsewhere == {"ssmscale-a": "alpha"}
    assert found.holds("ssmscale-a", SERIES)
    (view,) = jobs_of_runs(found).values()
    assert (view.state, view.job_id) == ("queued", "77")
    assert view.reason == "held by SLURM cluster alpha, which cannot be asked from here"
    root.series(SERIES).mkdir(parents=True)
    acquire(root.series(SERIES), Lease(study="theirs", array="ssmscale-a", process=gone, t=0.0))
    mine = Lease(study="mine", array="ssmscale-b", process=gone, t=1.0)
    assert not Leases(root).take(SERIES, mine)
    at_cluster("alpha")
    assert Leases(root).take(SERIES, mine)


def test_an_array_of_before_clusters_were_recorded_is_this_ones(
    tmp_path: Path, answering: Answering, gone: dict[str, Any]
) -> None:
    store = ArrayStore(tmp_path)
    store.write(array_of("ssmscale-a", gone, job_id="77"))
    path = store.folder / "ssmscale-a.json"
    fields = json.loads(path.read_text())
    del fields["slurm_cluster"]
    path.write_text(json.dumps(fields))
    answering("77_0|ssmscale-a|RUNNING|5:00|n1|None")
    assert open_ledger(tmp_path).holds("ssmscale-a", SERIES)
