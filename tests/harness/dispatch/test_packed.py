"""What is said and done of Runs that one job trains packed: which wait inside it, what they took, when it is ended."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.cli.status import summary
from harness.common.disk import write_atomically
from harness.common.process import identify_process
from harness.dispatch.arrays import Array, ArrayStore, packed_folder
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
from tests.conftest import Answer
from tests.harness.conftest import Answering
from tests.harness.journals import begin_run, begin_series, finish, log_steps, registered

Fields = dict[str, Any]

RUNS, WAITS = "77_0|ssmscale-a|RUNNING|5:00|n[1-2]|None", "77_0|ssmscale-a|PENDING|0:00||Priority"


@pytest.fixture
def study(tmp_path: Path, study_fields: Fields) -> ResolvedStudy:
    """Three Series of one Run each, all in the hands of one job."""
    study_fields["grid"] |= {"iterations": [10], "seeds": [0, 1, 2]}
    resolved = registered(Root(tmp_path / "runs"), study_fields)
    ArrayStore(resolved.root.study("tiny")).write(packed_array(resolved, "ssmscale-a", "77"))
    return resolved


def packed_array(resolved: ResolvedStudy, name: str, job_id: str) -> Array:
    return Array(
        name=name,
        shape=Shape(nodes=2, ranks=8, threads=1, memory_gib=1),
        tasks=tuple(
            Task(series_id=point.series_id, run_dirs=(resolved.root.run(point.run_id),))
            for point in resolved.points
        ),
        packed=True,
        process=identify_process(),
        t=time.time(),
        job_id=job_id,
    )


def states(resolved: ResolvedStudy) -> list[RunState]:
    return [row.state for row in rows_of(resolved)]


def test_one_job_stands_for_every_series_it_is_given(study: ResolvedStudy, answering: Answering) -> None:
    answering(WAITS)
    book = open_ledger(study.root.study("tiny"))
    assert all(book.holds("ssmscale-a", point.series_id) for point in study.points)
    assert {view.job_id for view in jobs_of(study).values()} == {"77_0"}
    assert states(study) == [RunState.QUEUED] * 3
    assert {row.reason for row in rows_of(study)} == {"Priority (jobs of higher priority go first)"}


def test_of_a_job_that_runs_only_what_is_being_trained_is_called_running(
    study: ResolvedStudy, answering: Answering
) -> None:
    answering(RUNS)
    done, trained, waiting = study.points
    begin_series(study.root, done.run, job_id="77_0").append(Event.FINISHED)
    finish(begin_run(study.root, done.run, job_id="77_0"), done.run)
    trunk = begin_series(study.root, trained.run, job_id="77_0", host="n2")
    log_steps(trunk, [1, 2])
    assert states(study) == [RunState.DONE, RunState.RUNNING, RunState.QUEUED]
    row = rows_of(study)[-1]
    assert (row.run_id, row.reason) == (waiting.run_id, "waits for its turn in job 77_0")
    trunk.append(Event.PREEMPTED, reason="SIGTERM")  # it is to go on as soon as there is room again
    assert states(study)[1] is RunState.QUEUED


def test_a_run_that_an_earlier_job_left_open_waits_inside_the_next(
    study: ResolvedStudy, answering: Answering
) -> None:
    answering(RUNS)
    begin_series(study.root, study.points[0].run, job_id="12_3", host="n2")
    assert states(study)[0] is RunState.QUEUED


def test_a_run_whose_worker_here_is_gone_waits_for_its_next(
    study: ResolvedStudy, answering: Answering, gone: dict[str, Any]
) -> None:
    answering(RUNS)
    begin_series(study.root, study.points[0].run, job_id="77_0", **gone)
    assert states(study)[0] is RunState.QUEUED


def test_what_a_job_has_not_trained_when_it_is_over_is_missing_again(
    study: ResolvedStudy, answering: Answering
) -> None:
    answering("77_0|ssmscale-a|TIMEOUT|5:00|n[1-2]|None")
    with begin_series(study.root, study.points[0].run, job_id="77_0") as trunk:
        log_steps(trunk, [3])
        trunk.append(Event.PREEMPTED, reason="SIGUSR2")
    rows = rows_of(study)
    assert [row.state for row in rows] == [RunState.INTERRUPTED, RunState.NEW, RunState.NEW]
    assert rows[0].reason == "SIGUSR2; job 77_0 is over: TIMEOUT"


def test_what_packed_runs_took_is_what_their_journals_say(
    study: ResolvedStudy, answering: Answering, tmp_path: Path
) -> None:
    answering(RUNS)
    sacct = tmp_path / "bin" / "sacct"
    sacct.write_text("#!/bin/sh\necho '77_0|ssmscale-a|RUNNING|36000|n1'\n")  # on eight GPUs, for all of them
    begun = {"t": 1000.0, "job_id": "77_0", "layout": {"ranks": 2}}
    with begin_series(study.root, study.points[0].run, **begun) as trunk:
        log_steps(trunk, [1], t=1018.0)
    assert StudyMonitor(study).read().hours.used_in_all == pytest.approx(2 * 18 / 3600)


def test_status_tells_of_the_allocation_and_how_its_dashboard_is_reached(
    study: ResolvedStudy, answering: Answering
) -> None:
    answering(WAITS)
    assert told(study)[-2] == (
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
    told_at = packed_folder(study.root.study("tiny"), "ssmscale-a") / "ray.json"
    write_atomically(told_at, ray.model_dump_json())
    *_, job, dashboard, _ = told(study)
    assert job == "job 77_0: 3 series packed on 2 nodes with 4 GPUs each, running for 5 min on n[1-2]"
    assert dashboard == (
        "Ray's dashboard: ssh -L 8265:127.0.0.1:8265 me@n1, then http://127.0.0.1:8265 with what is in /token"
    )
    (row,) = StudyMonitor(study).read().as_json()["allocations"]
    assert (row["job_id"], row["state"], row["nodes"], row["gpus"]) == ("77_0", "running", 2, 8)
    assert row["tunnel"] == "ssh -L 8265:127.0.0.1:8265 me@n1"
    told_at.write_text('{"address": 5')
    assert StudyMonitor(study).read().as_json()["allocations"][0]["tunnel"] is None
    answering("77_0|ssmscale-a|COMPLETED|5:00|n[1-2]|None")
    assert StudyMonitor(study).read().as_json()["allocations"] == []


def told(study: ResolvedStudy) -> list[str]:
    """The lines of `status` below its table."""
    return [str(line) for line in summary(StudyMonitor(study).read())]


def test_a_job_is_ended_when_no_run_of_it_is_wanted_any_more(
    study: ResolvedStudy, answering: Answering, tmp_path: Path
) -> None:
    answering(RUNS)
    told = tmp_path / "told"
    scancel = tmp_path / "bin" / "scancel"
    scancel.write_text(f'#!/bin/sh\necho "$@" >>"{told}"\n')
    scancel.chmod(0o755)
    finish(begin_run(study.root, study.points[0].run), study.points[0].run)
    rows = rows_of(study)
    cancel(study.root, "tiny", rows[1:2])
    assert cancel_jobs_of(study, rows) == {}
    assert not told.exists()
    cancel(study.root, "tiny", rows[2:])
    assert cancel_jobs_of(study, rows) == {"SLURM": ["77_0"]}
    assert told.read_text().split() == ["77_0"]


def test_of_what_is_over_it_is_said_why_nothing_is_cancelled(
    study: ResolvedStudy, answering: Answering, ssmscale: Callable[..., Answer]
) -> None:
    answering()
    done, failed, left = study.points
    finish(begin_run(study.root, done.run), done.run)
    give_up(study, failed)
    said = ssmscale("cancel", "tiny", done.run_id, failed.run_id)
    assert said.out.splitlines() == [
        f"run {done.run_id} is not cancelled: it has finished, and its result stays",
        f"run {failed.run_id} is not cancelled: it has failed, and is not trained again before `ssmscale retry`",
        "0 runs cancelled",
    ]
    assert ssmscale("cancel", "tiny").out == ("1 run cancelled; not cancelled: 1 done, 1 failed\n")
    assert ssmscale("cancel", "tiny", left.run_id).out.startswith(
        f"run {left.run_id} is not cancelled: it was cancelled before"
    )


def test_the_logs_of_the_one_job_are_every_runs(study: ResolvedStudy, answering: Answering) -> None:
    answering(RUNS)
    folder = packed_folder(study.root.study("tiny"), "ssmscale-a")
    folder.mkdir(parents=True)
    names = ["77_0_0_log.out", "controller.log"]
    for name in [*names, "ray-n1.log"]:
        (folder / name).write_text("Ray is up\n")
    for row in rows_of(study):
        assert [found.path.name for found in find_logs(study.root, "tiny", row)] == names


@pytest.fixture
def at_slurm(
    study: ResolvedStudy, answering: Answering, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Control:
    """The study was last packed on the devcluster, in a job that runs; SLURM takes another."""
    monkeypatch.delenv("SSMSCALE_CLUSTER", raising=False)
    answering(RUNS)
    for name, said in (("sinfo", "low"), ("sbatch", "Submitted batch job 78")):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\necho {said}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    control = Control(study.root.study("tiny") / "control.jsonl")
    control.append("submitted", runs=[], dispatcher="ray", cluster="devcluster", job_id="77")
    return control


def give_up(study: ResolvedStudy, *points: GridPoint) -> None:
    for point in points:
        with begin_run(study.root, point.run, job_id="77_0") as journal:
            journal.append(Event.FAILED, reason="its loss is not a number", kind="diverged")


def test_what_is_retried_while_its_job_runs_is_left_to_that_job(
    study: ResolvedStudy, at_slurm: Control, ssmscale: Callable[..., Answer]
) -> None:
    give_up(study, study.points[0])
    said = ssmscale("retry", "tiny")
    assert said.status == 0, said.err
    assert "1 run left to job 77_0, which is not over and trains them" in said.out
    assert "nothing of tiny is left" not in said.out
    assert states(study) == [RunState.QUEUED] * 3
    assert len(ArrayStore(study.root.study("tiny")).read()) == 1


def test_from_another_cluster_a_study_is_left_to_the_one_it_was_submitted_to(
    study: ResolvedStudy,
    at_slurm: Control,
    at_cluster: Callable[[str], None],
    ssmscale: Callable[..., Answer],
) -> None:
    at_cluster("alpha")
    ArrayStore(study.root.study("tiny")).write(
        packed_array(study, "ssmscale-a", "77").model_copy(update={"slurm_cluster": "alpha"})
    )
    assert ssmscale("submit", "tiny", "--on", "slurm", "--cluster", "devcluster").err == ""
    at_cluster("beta")
    said = ssmscale("submit", "tiny", "--on", "slurm", "--cluster", "devcluster")
    assert said.status == 0, said.err
    assert "nothing of tiny is left to submit" in said.out
    assert said.err.startswith(
        "warning: 3 runs left to job 77 of SLURM cluster alpha, which is not asked from here: see to it there; if "
    )
    assert {row.reason for row in rows_of(study)} == {
        "in the hands of SLURM cluster alpha, which is not asked from here"
    }


def test_a_submission_notes_which_cluster_it_went_to(
    study: ResolvedStudy,
    at_slurm: Control,
    answering: Answering,
    at_cluster: Callable[[str], None],
    ssmscale: Callable[..., Answer],
) -> None:
    answering("77_0|ssmscale-a|COMPLETED|5:00|n[1-2]|None")
    at_cluster("alpha")
    assert "3 series submitted" in ssmscale("submit", "tiny", "--on", "slurm", "--cluster", "devcluster").out
    assert list(ArrayStore(study.root.study("tiny")).read().values())[-1].slurm_cluster == "alpha"


def test_a_retry_without_room_is_refused_before_anything_is_forgotten(
    study: ResolvedStudy, at_slurm: Control, answering: Answering, ssmscale: Callable[..., Answer]
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
def test_a_ray_cluster_that_is_named_goes_before_a_cluster_that_is_not(
    study: ResolvedStudy,
    at_slurm: Control,
    ssmscale: Callable[..., Answer],
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


def test_a_retry_is_packed_on_as_many_nodes_as_the_newest_submission_said(
    study: ResolvedStudy, at_slurm: Control, answering: Answering, ssmscale: Callable[..., Answer]
) -> None:
    answering("77_0|ssmscale-a|COMPLETED|5:00|n[1-2]|None")
    at_slurm.append("submitted", runs=[], dispatcher="ray", cluster="devcluster", nodes=2, job_id="77")
    cancel(study.root, "tiny", rows_of(study))
    said = ssmscale("retry", "tiny")
    assert said.status == 0, said.err
    assert "on ray, cluster devcluster, up to 2 nodes, as it was last submitted" in said.out
    assert "3 runs in 3 series packed on 2 nodes with 2 GPUs each" in said.out
    assert at_slurm.read()[-1]["nodes"] == 2
    *_, array = ArrayStore(study.root.study("tiny")).read().values()
    assert array.shape.nodes == 2


def test_a_retry_takes_no_more_nodes_than_its_profile_gives_now_and_its_runs_fill(
    study: ResolvedStudy, at_slurm: Control, answering: Answering, ssmscale: Callable[..., Answer]
) -> None:
    answering("77_0|ssmscale-a|COMPLETED|5:00|n[1-2]|None")
    at_slurm.append("submitted", runs=[], dispatcher="ray", cluster="devcluster", nodes=8, job_id="77")
    rows = rows_of(study)
    cancel(study.root, "tiny", rows)
    said = ssmscale("retry", "tiny", rows[0].run_id)
    assert said.status == 0, said.err
    assert "1 run in 1 series packed on 1 node with 1 GPU submitted" in said.out
    assert at_slurm.read()[-1]["nodes"] == 2
    assert ssmscale("submit", "tiny", "--on", "ray", "--cluster", "devcluster", "--nodes", "8").status == 2


def test_a_retry_in_jobs_of_slurm_does_not_ask_the_ray_cluster_it_last_went_to(
    study: ResolvedStudy, at_slurm: Control, ssmscale: Callable[..., Answer]
) -> None:
    at_slurm.append("submitted", runs=[], dispatcher="ray", cluster=None, ray_address="http://h:8265")
    said = ssmscale("retry", "tiny", "--on", "slurm")
    assert said.status == 2
    assert said.err.startswith("error: --on slurm: name the cluster with --cluster")


def test_a_retry_by_auto_takes_the_cluster_of_the_newest_submission(
    study: ResolvedStudy, at_slurm: Control, ssmscale: Callable[..., Answer]
) -> None:
    assert (
        "on auto, cluster devcluster, as it was last submitted"
        in ssmscale("retry", "tiny", "--on", "auto").out
    )
