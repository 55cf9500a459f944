"""Runs that one job trains packed: their states, their GPU-hours, their logs, cancelling and retrying them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.cli.status import summary
from harness.common.disk import write_atomically
from harness.dispatch.arrays import Array, ArrayStore, new_array, packed_folder
from harness.dispatch.base import Task
from harness.dispatch.ledger import open_ledger
from harness.dispatch.ray.cluster import RayAddress
from harness.plan.allocation import Shape
from harness.record.control import Control
from harness.record.journal import Event
from harness.record.registry import ResolvedStudy
from harness.record.root import Root
from harness.record.status import RunState
from harness.study.grid import GridPoint
from harness.submit.cancel import cancel, cancel_jobs_of
from harness.submit.logs import find_logs
from harness.submit.monitor import StudyMonitor, jobs_of, rows_of
from tests.cluster.servers import free_port
from tests.conftest import Command
from tests.harness.conftest import Answering
from tests.harness.journals import begin_run, begin_series, finish, log_steps, registered
from tests.programs import write_program
from tests.studies import Fields

RUNS, WAITS = "77_0|ssmscale-a|RUNNING|5:00|n[1-2]|None", "77_0|ssmscale-a|PENDING|0:00||Priority"
OVER = "77_0|ssmscale-a|COMPLETED|5:00|n[1-2]|None"


@pytest.fixture
def study(tmp_path: Path, study_fields: Fields, answering: Answering) -> ResolvedStudy:
    """Three Series of one Run each, all trained by one job, which runs."""
    answering(RUNS)
    study_fields["grid"] |= {"iterations": [10], "seeds": [0, 1, 2]}
    resolved = registered(Root(tmp_path / "runs"), study_fields)
    tasks = [
        Task(series_id=point.series_id, run_dirs=(resolved.root.run(point.run_id),))
        for point in resolved.points
    ]
    shape = Shape(nodes=2, ranks=8, threads=1, memory_gib=1)
    array = new_array("ssmscale-a", shape, tasks, packed=True, job_id="77")
    ArrayStore(resolved.root.study("tiny")).write(array)
    return resolved


def arrays_of(resolved: ResolvedStudy) -> list[Array]:
    return list(ArrayStore(resolved.root.study("tiny")).read().values())


def states(resolved: ResolvedStudy) -> list[RunState]:
    return [row.state for row in rows_of(resolved)]


def test_one_job_holds_every_series_of_a_packed_array(study: ResolvedStudy, answering: Answering) -> None:
    answering(WAITS)
    ledger = open_ledger(study.root.study("tiny"))
    assert all(ledger.holds("ssmscale-a", point.series_id) for point in study.points)
    assert {view.job_id for view in jobs_of(study).values()} == {"77_0"}
    assert states(study) == [RunState.QUEUED] * 3
    assert {row.reason for row in rows_of(study)} == {"Priority (jobs of higher priority go first)"}


def test_only_the_runs_that_a_job_trains_now_are_running(study: ResolvedStudy) -> None:
    done, trained, waiting = study.points
    begin_series(study.root, done.run, job_id="77_0").append(Event.FINISHED)
    finish(begin_run(study.root, done.run, job_id="77_0"), done.run)
    trunk = begin_series(study.root, trained.run, job_id="77_0", host="n2")
    log_steps(trunk, [1, 2])
    assert states(study) == [RunState.DONE, RunState.RUNNING, RunState.QUEUED]
    row = rows_of(study)[-1]
    assert (row.run_id, row.reason) == (waiting.run_id, "waits for its turn in job 77_0")
    trunk.append(Event.PREEMPTED, reason="SIGTERM")  # the job trains it again as soon as devices are free
    assert states(study)[1] is RunState.QUEUED


@pytest.mark.parametrize("left_by", ["an earlier job", "a worker that has ended"])
def test_a_run_that_another_attempt_left_open_waits_for_its_turn(
    study: ResolvedStudy, gone: dict[str, Any], left_by: str
) -> None:
    begun = {"job_id": "12_3", "host": "n2"} if left_by == "an earlier job" else {"job_id": "77_0", **gone}
    begin_series(study.root, study.points[0].run, **begun)
    assert states(study)[0] is RunState.QUEUED


def test_runs_that_a_job_did_not_train_are_missing_when_it_is_over(
    study: ResolvedStudy, answering: Answering
) -> None:
    answering("77_0|ssmscale-a|TIMEOUT|5:00|n[1-2]|None")
    with begin_series(study.root, study.points[0].run, job_id="77_0") as trunk:
        log_steps(trunk, [3])
        trunk.append(Event.PREEMPTED, reason="SIGUSR2")
    rows = rows_of(study)
    assert [row.state for row in rows] == [RunState.INTERRUPTED, RunState.NEW, RunState.NEW]
    assert rows[0].reason == "SIGUSR2; job 77_0 is over: TIMEOUT"


def test_gpu_hours_of_packed_runs_are_those_of_their_journals(study: ResolvedStudy, tmp_path: Path) -> None:
    sacct = tmp_path / "bin" / "sacct"
    sacct.write_text("#!/bin/sh\necho '77_0|ssmscale-a|RUNNING|36000|n1'\n")  # on eight GPUs, for all of them
    begun = {"t": 1000.0, "job_id": "77_0", "layout": {"ranks": 2}}
    with begin_series(study.root, study.points[0].run, **begun) as trunk:
        log_steps(trunk, [1], t=1018.0)
    assert StudyMonitor(study).read().hours.used_in_all == pytest.approx(2 * 18 / 3600)


def test_status_shows_the_allocation_and_the_way_to_its_dashboard(
    study: ResolvedStudy, answering: Answering
) -> None:
    answering(WAITS)
    assert lines_of(study)[-2] == (
        "job 77_0: 3 series packed on 2 nodes with 4 GPUs each, queued: Priority (jobs of higher priority go first)"
    )
    answering(RUNS)
    ray = RayAddress(
        address="10.0.0.1:6379",
        token_file=Path("/token"),
        dashboard="http://127.0.0.1:8265",
        node="n1",
        user="me",
        temp_dir=Path("/tmp/ray"),
    )
    address_file = packed_folder(study.root.study("tiny"), "ssmscale-a") / "ray.json"
    write_atomically(address_file, ray.model_dump_json())
    *_, job, dashboard, _ = lines_of(study)
    assert job == "job 77_0: 3 series packed on 2 nodes with 4 GPUs each, running for 5 min on n[1-2]"
    assert dashboard == (
        "Ray's dashboard: ssh -L 8265:127.0.0.1:8265 me@n1, then http://127.0.0.1:8265 with the token in /token"
    )
    (row,) = StudyMonitor(study).read().as_json()["allocations"]
    assert (row["job_id"], row["state"], row["nodes"], row["gpus"]) == ("77_0", "running", 2, 8)
    assert row["tunnel"] == "ssh -L 8265:127.0.0.1:8265 me@n1"
    address_file.write_text('{"address": 5')
    assert StudyMonitor(study).read().as_json()["allocations"][0]["tunnel"] is None
    answering(OVER)
    assert StudyMonitor(study).read().as_json()["allocations"] == []


def lines_of(study: ResolvedStudy) -> list[str]:
    """Return the lines of `status` below its table."""
    return [str(line) for line in summary(StudyMonitor(study).read())]


def test_a_job_is_cancelled_when_all_of_its_runs_are_over_or_cancelled(
    study: ResolvedStudy, tmp_path: Path
) -> None:
    told = tmp_path / "told"
    write_program(tmp_path / "bin" / "scancel", f'echo "$@" >>"{told}"')
    finish(begin_run(study.root, study.points[0].run), study.points[0].run)
    rows = rows_of(study)
    cancel(study.root, "tiny", rows[1:2])
    assert cancel_jobs_of(study, rows).ended == {}
    assert not told.exists()
    cancel(study.root, "tiny", rows[2:])
    assert cancel_jobs_of(study, rows).ended == {"SLURM": ["77_0"]}
    assert told.read_text().split() == ["77_0"]


def test_cancel_says_why_it_does_not_cancel_a_run_that_is_over(
    study: ResolvedStudy, answering: Answering, ssmscale: Command
) -> None:
    answering()
    done, failed, left = study.points
    finish(begin_run(study.root, done.run), done.run)
    give_up(study, failed)
    said = ssmscale("cancel", "tiny", done.run_id, failed.run_id)
    assert said.out.splitlines() == [
        f"run {done.run_id} is not cancelled: it has finished, and its result stays",
        f"run {failed.run_id} is not cancelled: it has failed, and is not trained again before it is retried",
        "0 runs cancelled",
    ]
    assert ssmscale("cancel", "tiny").out == ("1 run cancelled; not cancelled: 1 done, 1 failed\n")
    assert ssmscale("cancel", "tiny", left.run_id).out.startswith(
        f"run {left.run_id} is not cancelled: it was cancelled before"
    )


def test_every_run_of_a_packed_job_has_the_logs_of_the_job(study: ResolvedStudy) -> None:
    folder = packed_folder(study.root.study("tiny"), "ssmscale-a")
    folder.mkdir(parents=True)
    names = ["77_0_0_log.out", "controller.log"]
    for name in [*names, "ray-n1.log"]:
        (folder / name).write_text("Ray is up\n")
    for row in rows_of(study):
        assert [found.path.name for found in find_logs(study.root, "tiny", row)] == names


@pytest.fixture
def at_slurm(study: ResolvedStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Control:
    """Control of a study that was last packed on the devcluster, in a job that runs; SLURM accepts another."""
    monkeypatch.delenv("SSMSCALE_CLUSTER", raising=False)
    for name, said in (("sinfo", "low"), ("sbatch", "Submitted batch job 78")):
        write_program(tmp_path / "bin" / name, f"echo {said}")
    control = Control(study.root.study("tiny") / "control.jsonl")
    control.append("submitted", runs=[], dispatcher="ray", cluster="devcluster", job_id="77")
    return control


def give_up(study: ResolvedStudy, *points: GridPoint) -> None:
    for point in points:
        with begin_run(study.root, point.run, job_id="77_0") as journal:
            journal.append(Event.FAILED, reason="its loss is not a number", kind="diverged")


def test_a_run_that_is_retried_while_its_job_runs_is_left_to_that_job(
    study: ResolvedStudy, at_slurm: Control, ssmscale: Command
) -> None:
    give_up(study, study.points[0])
    said = ssmscale("retry", "tiny")
    assert said.status == 0, said.err
    assert "1 run left to job 77_0, which is not over and trains them" in said.out
    assert "nothing of tiny is left" not in said.out
    assert states(study) == [RunState.QUEUED] * 3
    assert len(arrays_of(study)) == 1


def test_a_submission_from_another_cluster_leaves_a_study_to_the_cluster_that_it_records(
    study: ResolvedStudy,
    at_slurm: Control,
    answering: Answering,
    at_cluster: Callable[[str], None],
    ssmscale: Command,
) -> None:
    answering(OVER)
    at_cluster("alpha")
    submit = ("submit", "tiny", "--on", "slurm", "--cluster", "devcluster")
    assert "3 series submitted" in ssmscale(*submit).out
    assert arrays_of(study)[-1].slurm_cluster == "alpha"
    at_cluster("beta")
    said = ssmscale(*submit)
    assert said.status == 0, said.err
    assert "nothing of tiny is left to submit" in said.out
    assert said.err.startswith(
        "warning: 3 runs left to job 78 of SLURM cluster alpha, which cannot be asked from here: check it there; if "
    )
    assert {row.reason for row in rows_of(study)} == {
        "held by SLURM cluster alpha, which cannot be asked from here"
    }


def test_a_retry_that_does_not_fit_is_refused_before_any_attempt_is_reset(
    study: ResolvedStudy, at_slurm: Control, answering: Answering, ssmscale: Command
) -> None:
    answering()
    give_up(study, *study.points)
    registered_at = study.root.study("tiny") / "study.json"
    fields = json.loads(registered_at.read_text())
    fields["study"]["resources"] = {"ranks": 8}
    registered_at.write_text(json.dumps(fields))
    before = at_slurm.read()
    said = ssmscale("retry", "tiny", "--nodes", "1")
    assert (said.status, said.err) == (
        2,
        "error: --nodes 1: xs (prefix_simba) takes 8 GPUs, and there are 4\n",
    )
    assert at_slurm.read() == before


@pytest.mark.parametrize("named", ["the newest submission", "SSMSCALE_CLUSTER"])
def test_a_ray_cluster_that_is_named_takes_precedence_over_a_cluster_that_is_not(
    study: ResolvedStudy,
    at_slurm: Control,
    ssmscale: Command,
    monkeypatch: pytest.MonkeyPatch,
    named: str,
) -> None:
    if named == "SSMSCALE_CLUSTER":
        monkeypatch.setenv(named, "devcluster")
    address = f"http://127.0.0.1:{free_port()}"
    for verb in (["submit", "--on", "ray"], ["retry"]):
        said = ssmscale(*verb, "tiny", "--ray-address", address)
        assert (said.status, said.out) == (2, "")
        assert said.err.startswith(f"error: --ray-address {address}: nothing answers there")


@pytest.mark.parametrize(
    ("nodes", "retried", "packed"),
    [
        (2, 3, "on 2 nodes with 2 GPUs each submitted"),
        (8, 1, "on 1 node with 1 GPU submitted"),  # the profile allows two now, and one Run fills one
    ],
)
def test_a_retry_is_packed_on_as_many_nodes_as_the_last_submission_its_profile_and_its_runs_allow(
    study: ResolvedStudy,
    at_slurm: Control,
    answering: Answering,
    ssmscale: Command,
    nodes: int,
    retried: int,
    packed: str,
) -> None:
    answering(OVER)
    at_slurm.append("submitted", runs=[], dispatcher="ray", cluster="devcluster", nodes=nodes, job_id="77")
    rows = rows_of(study)
    cancel(study.root, "tiny", rows)
    said = ssmscale("retry", "tiny", *(row.run_id for row in rows[:retried]))
    assert said.status == 0, said.err
    assert f"on ray, cluster devcluster, up to {nodes} nodes, as in the last submission" in said.out
    assert f"in {retried} series packed {packed}" in said.out
    assert at_slurm.read()[-1]["nodes"] == 2
    assert ssmscale("submit", "tiny", "--on", "ray", "--cluster", "devcluster", "--nodes", "8").status == 2
