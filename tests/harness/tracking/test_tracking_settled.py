"""Runs that nobody trains, that were made twice or deleted: how the mirror settles them."""

from __future__ import annotations

import time
from typing import Any

import pytest

from harness.tracking.metrics import Measured
from ssmttm.errors import InputError
from tests.conftest import Command
from tests.harness.journals import begin_run, begin_series, finish, log_steps, registered, write_finished
from tests.harness.tracked import Study
from tests.harness.trainer import StopAfter, train


def test_a_run_nobody_trains_is_settled_as_killed_and_runs_again_when_it_does(study: Study) -> None:
    train(study.root, study.fields, StopAfter(3))
    tracker = study.tracker()
    study.mirror(tracker, settle=True)
    parent = study.the()
    assert parent.status == "KILLED"
    assert "interrupted" in parent.tags["ssmscale.reason"]
    train(study.root, study.fields)
    study.mirror(tracker, settle=True)
    held = list(tracker.experiment.search())
    assert {one.status for one in held} == {"FINISHED"}
    assert not any("ssmscale.reason" in one.tags for one in held)


def test_a_failed_run_is_failed_in_mlflow_with_its_reason(study: Study) -> None:
    study.fields["training"]["optimiser"] = {"lr": 1e5, "grad_clip": None}
    points = registered(study.root, study.fields).points
    train(study.root, study.fields)
    study.mirror(settle=True)
    for identity in (points[0].run.run_id, points[0].run.series_id):
        held = study.the(identity)
        assert held.status == "FAILED"
        assert "loss is" in held.tags["ssmscale.reason"]


def test_a_process_of_another_host_is_not_called_dead_before_it_was_still_for_long(study: Study) -> None:
    journal = begin_series(study.root, study.points[0].run, host="elsewhere", t=time.time() - 9000)
    log_steps(journal, [1])
    study.mirror(settle=True)
    assert study.the().status == "RUNNING"
    log_steps(journal, [2], t=time.time() - 5000)
    study.mirror(settle=True)  # the newest step is old
    assert study.the().status == "KILLED"


def test_a_run_the_study_lists_no_more_is_settled_by_its_journal(study: Study) -> None:
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
    # What a host leaves that does not share the lock: an older parent, with a child and half its metrics.
    parent = experiment.create(study.series_id, "series", "twin", 1, tags)
    child = experiment.create(run_id, "run", "twin", 1, {**tags, "mlflow.parentRunId": parent.mlflow_id})
    when = study.history(run_id)[0][1] if len(study.found(run_id)) == 1 else 0
    experiment.send(child, [Measured("step", "train_loss", 4, when or 5, 4.996)])
    done = study.mirror(settle=True, thorough=True)
    assert done.merged == 2
    assert study.the().mlflow_id == parent.mlflow_id
    held = study.the(run_id)
    assert (held.mlflow_id, held.status) == (child.mlflow_id, "FINISHED")
    assert study.steps(run_id) == [4, 5]
    assert study.steps(run_id, "lr") == [4, 5]
    for point in study.points:
        assert study.the(point.run.run_id).tags["mlflow.parentRunId"] == parent.mlflow_id
    assert {one.tags["ssmscale.merged_into"] for one in study.found(run_id, deleted=True)} == {
        child.mlflow_id
    }
    assert study.mirror(settle=True, thorough=True).merged == 0


def test_a_run_deleted_in_mlflow_stays_deleted_and_is_named(study: Study) -> None:
    write_finished(study.root, study.points)
    study.mirror()
    run_id = study.points[0].run.run_id
    held = study.the(run_id)
    client = study.tracker().experiment.client
    client.delete_run(held.mlflow_id)
    for _ in range(2):
        done = study.mirror(settle=True, thorough=True)
        assert any(run_id in note and "deleted" in note for note in done.notes)
        assert (len(study.found(run_id)), len(study.found(run_id, deleted=True))) == (0, 1)
    client.restore_run(held.mlflow_id)
    assert study.mirror(settle=True, thorough=True).notes == []


def test_sync_counts_no_run_that_was_deleted_in_mlflow(study: Study, ssmscale: Command) -> None:
    write_finished(study.root, study.points)
    sync = ("sync", "tiny", "--root", study.root.path)
    assert "2 finished runs are in" in ssmscale(*sync).out
    tracker = study.tracker()
    tracker.experiment.client.delete_run(study.the(study.points[1].run.run_id).mlflow_id)
    answer = ssmscale(*sync)
    assert "1 of 2 finished runs are in" in answer.out
    assert "was deleted in MLflow" in answer.err


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
        study.tracker()
