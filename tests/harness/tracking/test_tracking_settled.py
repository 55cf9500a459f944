"""The mirror settles runs that no process trains, that exist twice, or that were deleted."""

from __future__ import annotations

import time
from typing import Any

import pytest

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
        study.tracker()
