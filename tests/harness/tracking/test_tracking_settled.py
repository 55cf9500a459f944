"""The mirror settles runs that no process trains, that exist twice, or that were deleted."""

from __future__ import annotations

import json
import shutil
import sqlite3
import time
from contextlib import closing
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from harness.common.disk import side_by_side
from harness.record.root import Root
from harness.tracking.metrics import Measured
from ssmttm.errors import InputError
from tests.conftest import Command
from tests.harness.journals import begin_run, begin_series, finish, log_steps, registered, write_finished
from tests.harness.tracked import Study
from tests.harness.trainer import train


def test_a_failed_run_is_failed_in_mlflow_with_its_reason(study: Study) -> None:
    study.fields["training"]["optimiser"] = {"lr": 1e5, "grad_clip": None}
    points = registered(study.root, study.fields).points
    train(study.root, study.fields)
    study.mirror(settle=True)
    for identity in (points[0].run.run_id, points[0].run.series_id):
        held = study.the(identity)
        assert held.status == "FAILED"
        assert "loss is" in held.tags["ssmscale.reason"]


def test_a_process_of_another_host_is_settled_only_after_a_long_silence(study: Study) -> None:
    journal = begin_series(study.root, study.points[0].run, host="elsewhere", t=time.time() - 9000)
    log_steps(journal, [1])
    study.mirror(settle=True)
    assert study.the().status == "RUNNING"
    log_steps(journal, [2], t=time.time() - 5000)
    study.mirror(settle=True)
    assert study.the().status == "KILLED"


def test_a_run_that_the_study_no_longer_lists_is_settled_by_its_journal(study: Study) -> None:
    shorter, longer = study.points
    begin_series(study.root, shorter.run).close()
    log_steps(begin_run(study.root, longer.run), [9])
    study.mirror()
    log_steps(finished := begin_run(study.root, longer.run), [10])
    finish(finished, longer.run)
    study.fields["grid"]["iterations"] = [5]
    assert study.the(longer.run.run_id).status == "RUNNING"
    assert study.mirror(settle=True, thorough=True).settled == 1
    held = study.the(longer.run.run_id)
    assert held.status == "FINISHED"
    assert study.steps(longer.run.run_id) == [9, 10]


def test_runs_made_twice_are_merged_into_the_oldest(study: Study) -> None:
    write_finished(study.root, study.points, steps=2)
    study.mirror()
    experiment = study.tracker().experiment
    run_id = study.points[0].run.run_id
    tags = {"ssmscale.series": study.series_id}
    # A host that does not share the lock has left an older parent, with a child and half its metrics.
    parent = experiment.create(study.series_id, "series", "twin", 1, tags)
    child = experiment.create(run_id, "run", "twin", 1, {**tags, "mlflow.parentRunId": parent.mlflow_id})
    experiment.send(child, [Measured("step", "train_loss", 4, 5, 4.996)])
    done = study.mirror(settle=True, thorough=True)
    assert done.merged == 2
    assert study.the().mlflow_id == parent.mlflow_id
    held = study.the(run_id)
    assert (held.mlflow_id, held.status) == (child.mlflow_id, "FINISHED")
    assert study.steps(run_id) == [4, 5]
    assert study.steps(run_id, "lr") == [4, 5]
    for point in study.points:
        assert study.the(point.run.run_id).tags["mlflow.parentRunId"] == parent.mlflow_id
    (merged,) = study.found(run_id, deleted=True)
    assert merged.tags["ssmscale.merged_into"] == child.mlflow_id
    assert study.mirror(settle=True, thorough=True).merged == 0


def test_a_run_deleted_in_mlflow_is_named_and_stays_deleted_until_it_is_restored(
    study: Study, ssmscale: Command
) -> None:
    write_finished(study.root, study.points)
    sync = ("sync", "tiny", "--root", study.root.path)
    assert "2 finished runs are in" in ssmscale(*sync).out
    run_id = study.points[0].run.run_id
    mlflow_id, client = study.the(run_id).mlflow_id, study.tracker().experiment.client
    client.delete_run(mlflow_id)
    for _ in range(2):
        answer = ssmscale(*sync)
        assert "1 of 2 finished runs are in" in answer.out
        assert f"run {run_id} was deleted in MLflow" in answer.err
        assert (len(study.found(run_id)), len(study.found(run_id, deleted=True))) == (0, 1)
    client.restore_run(mlflow_id)
    answer = ssmscale(*sync)
    assert "2 finished runs are in" in answer.out
    assert "was deleted" not in answer.err


def test_a_run_deleted_while_it_trains_does_not_stop_the_others(study: Study, trunk: Any) -> None:
    log_steps(own := begin_run(study.root, study.points[0].run), [5])
    tracker = study.tracker()
    study.mirror(tracker)
    held = study.the(study.points[0].run.run_id)
    tracker.experiment.client.delete_run(held.mlflow_id)
    log_steps(own, [6])
    log_steps(trunk, [1, 2])
    study.mirror(tracker)
    study.mirror(tracker)
    assert study.steps() == [1, 2]


def test_a_deleted_experiment_is_named_with_what_to_do(study: Study) -> None:
    experiment = study.tracker().experiment
    experiment.client.delete_experiment(experiment.id)
    with pytest.raises(InputError, match=f"restore experiment {experiment.id}"):
        study.mirror(thorough=True)


# -- several ROOTs with a study of one name in one store


def beside(study: Study, tmp_path: Path, **grid: Any) -> Study:
    """Register a study of the same name in another ROOT that mirrors to the same store."""
    fields = deepcopy(study.fields)
    fields["grid"].update(grid)
    return Study(Root(tmp_path / "beside"), fields, study.uri)


def every_run(study: Study) -> dict[str, Any]:
    """Return all runs of the experiment by MLflow's id, of whatever ROOT."""
    experiment = study.tracker().experiment
    return {run.info.run_id: run for run in experiment.client.search_runs([experiment.id])}


def forget_roots(study: Study) -> None:
    """Leave in the store and in the ledger what an older version writes: nothing of ROOTs."""
    with closing(sqlite3.connect(study.uri.removeprefix("sqlite:///"))) as database, database:
        database.execute("DELETE FROM experiment_tags WHERE key LIKE 'ssmscale.root.%'")
        database.execute("DELETE FROM tags WHERE key = 'ssmscale.root'")
    ledger = study.root.study("tiny") / "mirrored.json"
    held = json.loads(ledger.read_text())
    ledger.write_text(json.dumps({key: held[key] for key in ("store", "closed")}))


def test_a_sync_leaves_the_runs_of_another_root_alone(study: Study, tmp_path: Path) -> None:
    write_finished(study.root, study.points)
    assert not study.mirror(settle=True).notes
    other = beside(study, tmp_path, seeds=[7])
    log_steps(begin_series(other.root, other.points[0].run), [1])
    assert "1 other ROOT with a study named tiny" in " ".join(other.mirror().notes)
    assert not other.mirror().notes  # it is said once, and at each sync
    done = study.mirror(settle=True, thorough=True)
    assert (done.settled, done.merged) == (0, 0)
    assert "1 other ROOT with a study named tiny" in " ".join(done.notes)
    assert (other.the().status, other.steps()) == ("RUNNING", [1])
    assert {study.the("tiny").status, other.the("tiny").status} == {"FINISHED", "RUNNING"}
    for one in (study, other):
        client, held = one.tracker().experiment.client, one.the("tiny")
        sent = json.loads(Path(client.download_artifacts(held.mlflow_id, "study.json")).read_text())
        assert sent["study"]["grid"].get("seeds") == one.fields["grid"].get("seeds")


def test_the_same_run_in_two_roots_is_two_runs_that_are_never_merged(study: Study, tmp_path: Path) -> None:
    other = beside(study, tmp_path)
    for one, steps in ((study, [1, 2]), (other, [1, 2, 3])):
        log_steps(begin_series(one.root, one.points[0].run), steps)
        one.mirror()
    for one, steps in ((study, [1, 2]), (other, [1, 2, 3])):
        assert one.mirror(settle=True, thorough=True).merged == 0
        assert one.steps() == steps
    assert study.the().mlflow_id != other.the().mlflow_id


def test_a_root_adopts_the_runs_that_its_older_version_mirrored(study: Study, tmp_path: Path) -> None:
    write_finished(study.root, study.points)
    study.mirror(settle=True)
    before = set(every_run(study))
    forget_roots(study)
    assert study.tracker().mlflow_ids()  # the older ledger is still good
    done = study.mirror(settle=True, thorough=True)
    assert (done.notes, done.settled, set(every_run(study))) == ([], 0, before)
    assert {run.data.tags["ssmscale.root"] for run in every_run(study).values()} == {study.root.identity()}
    other = beside(study, tmp_path)
    write_finished(other.root, other.points)
    other.mirror(settle=True)
    assert len(every_run(study)) == 2 * len(before)


@pytest.mark.parametrize("age", [0.0, 9000.0])
def test_a_run_of_an_older_version_that_another_root_may_train_is_not_ended(
    study: Study, tmp_path: Path, age: float
) -> None:
    other = beside(study, tmp_path, seeds=[7])
    log_steps(begin_series(other.root, other.points[0].run), [1], t=time.time() - age)
    other.mirror()
    other.mirror(settle=True, thorough=True)
    held, theirs = other.the(), other.the("tiny")
    forget_roots(other)
    with closing(sqlite3.connect(study.root.path / "mlflow.db")) as database, database:
        database.execute("UPDATE runs SET start_time = start_time - ?", (int(age * 1000),))
    write_finished(study.root, study.points)
    study.mirror(settle=True, thorough=True)
    runs = every_run(study)
    assert runs[held.mlflow_id].info.status == ("KILLED" if age else "RUNNING")
    assert "ssmscale.root" not in runs[theirs.mlflow_id].data.tags


def test_a_copied_root_is_the_same_to_a_tracker_until_it_is_given_an_identity_of_its_own(
    study: Study, tmp_path: Path
) -> None:
    write_finished(study.root, study.points)
    study.mirror(settle=True)
    copied = Root(Path(shutil.copytree(study.root.path, tmp_path / "copy")))
    copy = Study(copied, study.fields, study.uri)
    copy.mirror(settle=True, thorough=True)
    assert len(every_run(study)) == 4
    (copied.path / "root.json").unlink()
    copy.mirror(settle=True)
    assert len(every_run(study)) == 8


def test_processes_that_make_an_identity_at_once_agree(tmp_path: Path) -> None:
    root = Root(tmp_path / "runs")
    found = side_by_side(lambda _: Root(root.path).identity(), range(16), 16)
    assert len(set(found)) == 1
    (root.path / "root.json").write_text("{}")
    with pytest.raises(InputError, match=r"root\.json: identity"):
        root.identity()
