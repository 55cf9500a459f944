"""Studies that share a trunk: what one lacks joins the work of the other's job or process, and no Run is lost."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.common.process import identify_process
from harness.dispatch.base import Task
from harness.dispatch.ledger import Ledger
from harness.dispatch.slurm.job import has_more, settle, start_of
from harness.dispatch.supervise import JobSupervisor
from harness.record.jobs import JobState
from harness.record.journal import Event, read_progress
from harness.record.registry import ResolvedStudy
from harness.record.root import Root, read_launch, read_run, write_launch, write_run
from harness.record.series import WorkList, unfinished
from harness.study.grid import GridPoint
from harness.submit.leases import Lease, Leases, acquire
from harness.train.stopping import EXIT_PREEMPTED, StopFlag
from harness.train.worker import train_series
from tests.harness.dispatch.fakes import FakeBackend
from tests.harness.journals import begin_run, begin_series, finish, registered
from tests.harness.submit.test_left_to_others import Here, here, states  # noqa: F401
from tests.harness.trainer import losses, prepared, train, undisturbed
from tests.studies import Fields, with_iterations
from tests.waiting import PATIENCE, paced, wait_until

ARRAY = "ssmscale-a"


def of_study(root: Root, fields: Fields, name: str, *iterations: int) -> ResolvedStudy:
    """Register a study of one Series under a name, and write its Runs."""
    found = registered(root, {**with_iterations(fields, *iterations), "name": name})
    for point in found.points:
        write_run(root, point.run)
    return found


def list_of(study: ResolvedStudy, *given: GridPoint) -> WorkList:
    ids = [point.run_id for point in given]
    return WorkList(study.root, study.points[0].series_id, ids, study.root.control(study.study.name))


def ask(study: ResolvedStudy, array: str = "") -> None:
    work = list_of(study)
    work.path.parent.mkdir(parents=True, exist_ok=True)
    with work.locked():
        work.add(study.study.name, [point.run_id for point in study.points], array)


class Leased(Leases):
    """Leases whose scheduler takes every job for live."""

    def _ledger(self, study_name: str, since: str | None = None) -> Ledger:
        return Ledger({}, {}, {})

    def _holds(self, lease: Lease, series_id: str) -> bool:
        return not WorkList(self.root, series_id).is_over(lease.array)


@pytest.fixture
def other(here_root: Root, study_fields: Fields) -> ResolvedStudy:
    """A study of one Run, whose Series a job of another study has leased."""
    found = of_study(here_root, study_fields, "other", 10)
    folder = here_root.series(found.points[0].series_id)
    folder.mkdir(parents=True)
    acquire(folder, Lease(study="theirs", array=ARRAY, process=identify_process(), t=time.time()))
    return found


@pytest.fixture
def here_root(tmp_path: Path) -> Root:
    return Root(tmp_path / "runs")


# -- the end of a trainer's work, and a Run that joins at that time


def join(other: ResolvedStudy) -> bool:
    (point,) = other.points
    return Leased(other.root).join(point.series_id, "other", [point.run_id]) is not None


def test_a_run_that_joins_before_the_last_look_is_seen_by_it(other: ResolvedStudy) -> None:
    assert join(other)
    assert not list_of(other).close(ARRAY)
    assert [folder.name for folder in list_of(other).joined()] == [other.points[0].run_id]


def test_after_the_last_look_no_run_joins_and_the_lease_is_free(other: ResolvedStudy) -> None:
    series_id = other.points[0].series_id
    assert list_of(other).close(ARRAY)
    assert not join(other)
    mine = Lease(study="other", array="ssmscale-b", process=identify_process(), t=time.time())
    assert Leased(other.root).take(series_id, mine)


def test_a_run_that_asks_between_the_last_look_and_its_line_waits_for_that_line(
    other: ResolvedStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The submission has found the job live and the list open; meanwhile the job has its last look."""
    joined: list[bool] = []
    submission = threading.Thread(target=lambda: joined.append(join(other)))
    look = WorkList.joined

    def look_and_be_joined(work: WorkList) -> list[Path]:
        found = look(work)
        submission.start()
        submission.join(0.2)  # it waits for the lock
        assert not joined
        return found

    monkeypatch.setattr(WorkList, "joined", look_and_be_joined)
    assert list_of(other).close(ARRAY)
    submission.join(PATIENCE)
    assert joined == [False]


def test_whatever_the_order_a_run_is_trained_or_refused(
    here_root: Root, study_fields: Fields, times: int
) -> None:
    """A trainer goes on until its last look finds nothing, while a submission comes at any moment."""
    for number in range(20 * times):
        study_fields["grid"]["seeds"] = [number]
        other = of_study(here_root, study_fields, "other", 10)
        (point,) = other.points
        folder = here_root.series(point.series_id)
        folder.mkdir(parents=True)
        acquire(folder, Lease(study="theirs", array=ARRAY, process=identify_process(), t=time.time()))
        together = threading.Barrier(2)
        trainer = threading.Thread(target=work_until_the_end, args=(other, together))
        trainer.start()
        together.wait()
        time.sleep(0.0005 * (number % 10))
        has_joined = join(other)
        trainer.join(PATIENCE)
        is_trained = read_progress(here_root.run(point.run_id)).state == Event.FINISHED
        assert has_joined == is_trained


def work_until_the_end(other: ResolvedStudy, together: threading.Barrier) -> None:
    together.wait()
    (point,) = other.points
    while not list_of(other).close(ARRAY):
        finish(begin_run(other.root, point.run), point.run)


def test_runs_that_joined_a_job_which_ended_are_not_asked_for_any_more(other: ResolvedStudy) -> None:
    join(other)
    assert list_of(other).close(ARRAY, by_force=True)
    assert list_of(other).joined() == []
    ask(other, "ssmscale-b")
    assert list_of(other).close(ARRAY, by_force=True)  # of the old job, once more and late
    assert [request.array for request in list_of(other).requests()] == ["ssmscale-b"]


def test_damaged_lines_runs_of_other_series_and_paths_are_skipped(
    here_root: Root, study_fields: Fields
) -> None:
    other = of_study(here_root, study_fields, "other", 10)
    study_fields["grid"]["seeds"] = [1]
    elsewhere = of_study(here_root, study_fields, "elsewhere", 10)
    ask(other)
    work = list_of(other)
    line = '{"t": 1, "event": "joined", "runs": ["%s"], "study": "%s", "array": ""}\n'
    with work.path.open("a") as file:
        file.write("{torn\n" + line % (elsewhere.points[0].run_id, "other"))
        file.write(line % (f"../runs/{other.points[0].run_id}", "other"))
        file.write(line % (other.points[0].run_id, "../other"))
    assert [(request.run_id, request.study) for request in work.requests()] == [
        (other.points[0].run_id, "other")
    ]


# -- the worker


class Meanwhile(StopFlag):
    """Never stops; does something when it has been read so many times."""

    def __init__(self, asked: int, do: Any) -> None:
        self._left, self._do = asked, do

    @property  # type: ignore[override]
    def reason(self) -> str | None:
        self._left -= 1
        if self._left == 0:
            self._do()
        return None


@pytest.mark.parametrize("asked", [2, 10], ids=["on the trunk", "on the last branch"])
def test_runs_that_join_while_a_worker_trains_are_trained_by_it_and_end_as_alone(
    here_root: Root, study_fields: Fields, asked: int
) -> None:
    fields = with_iterations(study_fields, 10)
    other = of_study(here_root, study_fields, "other", 5, 15)
    assert train(here_root, fields, Meanwhile(asked, lambda: ask(other))) == ["finished"]
    assert losses(here_root, with_iterations(study_fields, 5, 10, 15)) == undisturbed(
        with_iterations(study_fields, 5, 10, 15)
    )
    assert read_progress(here_root.series(other.points[0].series_id)).attempt == 1
    assert list_of(other).joined() == []


def test_a_run_is_left_only_when_all_who_asked_for_it_have_cancelled_it(
    here_root: Root, study_fields: Fields
) -> None:
    mine, other = (of_study(here_root, study_fields, name, 5, 10) for name in ("tiny", "other"))
    short, long = mine.points
    ask(other)
    work = list_of(mine, short, long)
    here_root.control("tiny").append("cancelled", runs=[short.run_id, long.run_id])
    assert work.cancelled() == set()
    before = work.state()
    here_root.control("other").append("cancelled", runs=[long.run_id])
    assert work.state() != before
    assert work.cancelled() == {long.run_id}
    assert [folder.name for folder in work.left()] == [short.run_id]


def test_a_worker_that_finds_its_series_taken_has_its_runs_join_that_work(
    here_root: Root, study_fields: Fields
) -> None:
    others = {**with_iterations(study_fields, 15), "name": "other"}
    (_, late) = prepared(here_root, others)[0]

    def come_too_late() -> None:
        assert train_series(late, here_root, StopFlag()) == "busy"

    launch = prepared(here_root, with_iterations(study_fields, 10))
    write_launch(
        here_root,
        late[0].series_id,
        read_launch(here_root, late[0].series_id).model_copy(
            update={"control": here_root.control("other").path}
        ),
    )
    ((root, runs),) = launch
    assert train_series(runs, root, Meanwhile(3, come_too_late)) == "finished"
    fields = with_iterations(study_fields, 10, 15)
    assert losses(here_root, fields) == undisturbed(fields)


# -- the job


@pytest.fixture
def job(scontrol: Path, here_root: Root, study_fields: Fields) -> Task:
    """A job of study tiny whose only Run has finished, and a Run of study other that has joined it."""
    mine, other = of_study(here_root, study_fields, "tiny", 5), of_study(here_root, study_fields, "other", 10)
    prepared(here_root, with_iterations(study_fields, 5))
    finish(begin_run(here_root, mine.points[0].run), mine.points[0].run)
    with begin_series(here_root, mine.points[0].run) as journal:
        journal.append(Event.FINISHED)
    ask(other, ARRAY)
    return Task(series_id=mine.points[0].series_id, run_dirs=(here_root.run(mine.points[0].run_id),))


def test_a_job_preempted_while_it_trains_a_run_that_joined_is_requeued(
    job: Task, scontrol: Path, here_root: Root
) -> None:
    start = start_of(job, Path(), ARRAY)
    (joined,) = job.work().joined()
    began, before = time.time() - 1, start.place()
    with begin_run(here_root, read_run(joined)) as journal:
        journal.append(Event.PREEMPTED, reason="SIGTERM")
    assert settle(start, 0, began, before) == EXIT_PREEMPTED
    assert scontrol.read_text().split() == ["7_0"]
    assert not job.work().is_closed(ARRAY)


def test_a_job_whose_ranks_ended_just_before_a_run_joined_starts_them_again_and_once(job: Task) -> None:
    start, began = start_of(job, Path(), ARRAY), time.time()
    assert has_more(start, 0, began, known=[])
    assert not has_more(start, 0, began, known=start.requests())  # other processes train it
    (joined,) = job.work().joined()
    finish(begin_run(job.root, read_run(joined)), read_run(joined))
    assert not has_more(start, 0, began, known=[])
    assert job.work().is_over(ARRAY)


def test_a_task_whose_worker_was_lost_with_a_run_that_joined_is_submitted_here_again(
    job: Task, here_root: Root
) -> None:
    backend = FakeBackend(here_root.study("tiny"), lambda handle: JobState.LOST)
    supervisor = JobSupervisor(here_root.control("tiny"), backend)
    supervisor.watch_over(backend.submit([job]))
    assert supervisor.stopped_with_joined() == []
    supervisor.take_back()
    assert supervisor.stopped_with_joined() == [job]
    supervisor.watch_over(backend.submit([job]))
    assert supervisor.stopped_with_joined() == []


# -- the commands


def test_a_study_joins_the_job_that_trains_its_trunk_is_shown_with_it_and_keeps_it_alive(
    here: Here,  # noqa: F811
) -> None:
    tiny = here.fields
    here.fields["grid"]["iterations"] = [5]
    here.submit()
    here.slurm_says("PENDING")
    here.fields = {**with_iterations(tiny, 5, 10), "name": "other"}
    assert "2 runs join job 77_0 of study tiny, which trains their trunk" in here.submit().out
    assert "nothing of other is left to submit" in here.submit().out
    told = here.ask("status", "--json").document
    assert told["counts"] == {"queued": 2}
    (reason,) = {run["reason"] for run in told["runs"]}
    assert reason.startswith("job 77_0 of study tiny trains its trunk, and waits: ")
    here.fields = {**tiny, "name": "tiny"}
    said = here.ask("cancel")
    assert "job 77_0 goes on: runs of other studies have joined it" in said.out
    assert "is trained for study other all the same" in said.out
    here.fields = {**with_iterations(tiny, 5, 10), "name": "other"}
    assert "2 runs cancelled" in here.ask("cancel").out
    assert "2 runs join job 77_0" in here.ask("retry").out
    here.ask("cancel")
    here.fields = {**tiny, "name": "tiny"}
    assert "1 job taken from SLURM: 77_0" in here.ask("cancel").out
    # The job is still there while it ends, and nothing joins it any more.
    here.fields = {**with_iterations(tiny, 5, 10), "name": "third"}
    assert "1 series not submitted: a job that trained it is ending" in here.submit().err


def test_a_study_submitted_to_slurm_joins_the_process_that_trains_its_trunk_here(
    here: Here,  # noqa: F811
    tmp_path: Path,
) -> None:
    local = {**with_iterations(here.fields, 2000), "name": "local"}
    study = tmp_path / "local.yaml"
    study.write_text(yaml.safe_dump(local), encoding="utf-8")
    line = [sys.executable, "-m", "harness", "submit", str(study), "--on", "local"]
    with subprocess.Popen(
        [*line, "--root", str(here.root.path)],
        env=paced(0.1),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as training:
        wait_until(
            lambda: any(read_progress(folder).step > 2 for folder in here.root.path.glob("series/*")),
            on=training,
        )
        others = here.fields = {**with_iterations(here.fields, 5, 25), "name": "other"}
        assert "2 runs join the process, which trains their trunk" in here.submit().out
        assert here.ask("status", "--json").document["counts"] == {"running": 2}
        here.fields = local
        assert "1 run cancelled" in here.ask("cancel").out
        said, _ = training.communicate(timeout=PATIENCE)
        assert training.returncode == 0, said
    here.fields = others
    assert len(losses(here.root, others)) == 2
    told = here.ask("status", "--json").document
    assert told["counts"] == {"done": 2}
    assert told["gpu_hours"]["used_by_shared_series"] == told["gpu_hours"]["used"] > 0
    assert (
        unfinished([here.root.run(run["run_id"]) for run in told["runs"]], here.root.control("other")) == []
    )
