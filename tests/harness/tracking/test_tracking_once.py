"""MLflow holds everything of the journals once, at the journal's time, whatever interrupted a mirror."""

from __future__ import annotations

from typing import Any

import pytest

from harness.record.journal import Event
from harness.tracking.experiment import Experiment
from tests.harness.journals import begin_series, log_steps, read_events, write_finished
from tests.harness.tracked import Calls, Study
from tests.harness.trainer import StopAfter, series_folder, train


def test_every_step_is_mirrored_once_with_the_journals_time(study: Study) -> None:
    train(study.root, study.fields)
    for _ in range(2):  # by two processes, one after the other
        study.mirror()
    told = [
        (event["step"], int(event["t"] * 1000), event["loss"])
        for event in read_events(series_folder(study.root))
        if event["event"] == "step"
    ]
    assert study.history() == told
    assert [study.steps(point.run.run_id) for point in study.points] == [[5], [9, 10]]


def test_an_interrupted_series_is_killed_and_then_completed_without_repeating_a_step(study: Study) -> None:
    train(study.root, study.fields, StopAfter(3))
    tracker = study.tracker()
    study.mirror(tracker, settle=True)
    parent = study.the()
    assert (parent.status, study.steps()) == ("KILLED", [1, 2, 3])
    assert "interrupted" in parent.tags["ssmscale.reason"]
    train(study.root, study.fields)
    study.mirror(tracker, settle=True)
    assert study.steps() == list(range(1, 9))
    held = list(tracker.experiment.search())
    assert {one.status for one in held} == {"FINISHED"}
    assert not any("ssmscale.reason" in one.tags for one in held)


def test_an_evaluation_journalled_after_its_step_was_mirrored_is_not_lost(study: Study, trunk: Any) -> None:
    log_steps(trunk, [4])
    tracker = study.tracker()
    study.mirror(tracker)
    trunk.append(Event.EVAL, step=4, loss=3.5)
    study.mirror(tracker)
    assert study.steps(key="valid_loss") == [4]


def test_what_a_mirror_sent_before_it_was_killed_is_not_sent_again(study: Study, trunk: Any) -> None:
    log_steps(trunk, [1])
    study.mirror()
    log_steps(trunk, [2, 3])
    held = study.the()
    experiment, event = study.tracker().experiment, list(read_events(series_folder(study.root)))[2]
    # A mirror was killed after its metrics arrived and before its mark did.
    from mlflow.entities import Metric

    sent = Metric("train_loss", event["loss"], int(event["t"] * 1000), 2)
    experiment.client.log_batch(held.mlflow_id, metrics=[sent])
    log_steps(begin_series(study.root, study.points[0].run), [2, 3, 4], loss=1.0)  # by a later attempt
    study.mirror()
    assert study.steps() == [1, 2, 3, 4]
    assert study.history()[1] == (2, int(event["t"] * 1000), event["loss"])
    assert study.steps(key="lr") == [1, 2, 3, 4]  # none of them had arrived


def test_a_step_that_another_mirror_sent_and_a_later_attempt_logged_again_is_there_once(
    study: Study, trunk: Any
) -> None:
    log_steps(trunk, range(1, 4))
    first = study.tracker()
    study.mirror(first)
    log_steps(trunk, range(4, 7))
    study.mirror()  # by another tracker, as `ssmscale sync` does
    log_steps(begin_series(study.root, study.points[0].run), range(4, 8), tokens_per_second=77.0)
    study.mirror(first)
    assert study.steps() == list(range(1, 8))


@pytest.mark.parametrize("anew", [False, True], ids=["same mirror", "another mirror"])
@pytest.mark.parametrize("later", [[20, 30, 40], [15, 20, 25]], ids=["steps beyond", "steps between"])
def test_a_later_attempt_adds_its_steps_and_those_logged_again_keep_their_first_time(
    study: Study, trunk: Any, later: list[int], anew: bool
) -> None:
    log_steps(trunk, [10, 20, 30], t=1000.0)
    tracker = study.tracker()
    study.mirror(tracker)
    log_steps(begin_series(study.root, study.points[0].run), later, t=2000.0)
    study.mirror(study.tracker() if anew else tracker)
    expected = dict.fromkeys(later, 2000_000) | dict.fromkeys([10, 20, 30], 1000_000)
    assert [(step, when) for step, when, _ in study.history()] == sorted(expected.items())


def test_more_metrics_than_a_call_takes_arrive_each_once(study: Study, trunk: Any) -> None:
    log_steps(trunk, range(1, 421))
    study.mirror()
    assert study.steps() == list(range(1, 421)) == study.steps(key="grad_norm")


@pytest.mark.parametrize("call", ["create_run", "log_batch", "set_terminated"])
def test_a_call_that_failed_after_it_took_effect_is_not_repeated(
    study: Study, calls: Calls, call: str
) -> None:
    write_finished(study.root, study.points, steps=3)
    tracker = study.tracker()
    calls.failing.add(call)
    with pytest.raises(Exception, match="502"):
        study.mirror(tracker)
    assert call not in calls.failing
    study.mirror(tracker)
    assert sorted(one.identity for one in tracker.experiment.search()) == sorted(
        {"tiny", study.series_id, *(point.run.run_id for point in study.points)}
    )
    for run in (point.run for point in study.points):
        assert study.steps(run.run_id) == list(range(run.iterations - 2, run.iterations + 1))
        assert study.steps(run.run_id, "final.loss") == [run.iterations]


def test_a_finished_run_costs_four_calls_and_afterwards_none(
    study: Study, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_finished(study.root, study.points)
    tracker = study.tracker()
    study.mirror(tracker)
    made = sorted(calls.made)
    for _ in ("the series", *study.points):
        for call in ("create_run", "log_artifact", "log_batch", "set_terminated"):
            made.remove(call)
    assert made == ["create_run", "log_artifact", "log_batch", "set_terminated"]  # the study's own run
    calls.made.clear()
    study.mirror(tracker)
    study.mirror()
    study.mirror(thorough=True, settle=True)
    assert calls.made == []
    for call in ("search", "send"):  # without `thorough`, a finished Series is not even looked for
        monkeypatch.setattr(Experiment, call, None)
    study.mirror(settle=True)


def test_two_mirrors_at_once_create_one_run_of_each(study: Study) -> None:
    early = study.tracker()
    study.mirror(early)  # finds nothing
    write_finished(study.root, study.points)
    study.mirror()
    study.mirror(early)
    assert len(list(early.experiment.search())) == 4
