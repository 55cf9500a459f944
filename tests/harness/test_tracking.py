"""MLflow mirrors the journals: everything once, at the journal's time, whatever happened in between."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from harness.experiment import Experiment, Held
from harness.grid import GridPoint
from harness.journal import Event, read_events
from harness.measurements import Measured
from harness.rundir import Root
from harness.series_mirror import active
from harness.tracking import Mirrored, Tracker, default_uri
from ssmttm.errors import InputError
from tests.conftest import Answer
from tests.harness.journals import (
    begin_run,
    begin_series,
    finish,
    log_steps,
    registered,
    rows_of,
    write_finished,
)
from tests.harness.trainer import StopAfter, series_folder, train

Fields = dict[str, Any]


class Study:
    """The tiny study of one Series and two Runs, its journals and its experiment."""

    def __init__(self, root: Root, fields: Fields) -> None:
        self.root, self.fields = root, fields
        self.points: tuple[GridPoint, ...] = registered(root, fields).points

    @property
    def series_id(self) -> str:
        return self.points[0].run.series_id

    def tracker(self) -> Tracker:
        return Tracker(default_uri(self.root), "tiny", self.root)

    def mirror(self, tracker: Tracker | None = None, **how: Any) -> Mirrored:
        return (tracker or self.tracker()).mirror(rows_of(self.root, self.fields), **how)

    def found(self, identity: str | None = None, *, deleted: bool = False) -> list[Held]:
        held = [one for one in self.tracker().experiment.search() if one.deleted is deleted]
        return [one for one in held if one.identity == (identity or self.series_id)]

    def history(self, identity: str | None = None, key: str = "train_loss") -> list[tuple[int, int, float]]:
        (held,) = self.found(identity)
        metrics = self.tracker().experiment.client.get_metric_history(held.mlflow_id, key)
        return sorted((metric.step, metric.timestamp, metric.value) for metric in metrics)

    def steps(self, identity: str | None = None, key: str = "train_loss") -> list[int]:
        return [step for step, *_ in self.history(identity, key)]


@pytest.fixture
def study(tracked_root: Root, study_fields: Fields) -> Study:
    return Study(tracked_root, study_fields)


@pytest.fixture
def trunk(study: Study) -> Any:
    return begin_series(study.root, study.points[0].run)


class Calls:
    """Counts what is asked and told of MLflow, and lets some calls fail after they were heard."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from mlflow import MlflowClient

        self.made: list[str] = []
        self.failing: set[str] = set()
        for name in ("create_run", "log_batch", "set_terminated", "set_tag", "log_artifact"):
            monkeypatch.setattr(MlflowClient, name, self._counted(name, getattr(MlflowClient, name)))

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            from mlflow.exceptions import MlflowException

            self.made.append(name)
            answer = call(*arguments, **named)
            if name in self.failing:
                self.failing.remove(name)
                raise MlflowException("502 Bad Gateway", error_code=13)
            return answer

        return counted


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


# -- everything once


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


def test_what_was_mirrored_half_way_is_completed_and_not_repeated(study: Study) -> None:
    train(study.root, study.fields, StopAfter(3))
    study.mirror()
    assert study.steps() == [1, 2, 3]
    train(study.root, study.fields)
    study.mirror()
    assert study.steps() == list(range(1, 9))
    assert study.found()[0].status == "FINISHED"


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
    (held,) = study.found()
    experiment, event = study.tracker().experiment, list(read_events(series_folder(study.root)))[2]
    # What a mirror leaves that is killed after its metrics arrived and before its mark did.
    from mlflow.entities import Metric

    sent = Metric("train_loss", event["loss"], int(event["t"] * 1000), 2)
    experiment.client.log_batch(held.mlflow_id, metrics=[sent])
    log_steps(
        begin_series(study.root, study.points[0].run), [2, 3, 4], loss=1.0
    )  # and a later attempt's word
    study.mirror()
    assert study.steps() == [1, 2, 3, 4]
    assert study.history()[1] == (2, int(event["t"] * 1000), event["loss"])
    assert study.steps(key="lr") == [1, 2, 3, 4]  # of which nothing had arrived


def test_a_step_another_mirror_sent_before_a_later_attempt_told_it_again_is_there_once(
    study: Study, trunk: Any
) -> None:
    log_steps(trunk, range(1, 4))
    goes_along = study.tracker()
    study.mirror(goes_along)
    log_steps(trunk, range(4, 7))
    study.mirror()  # `ssmscale sync`, say
    log_steps(begin_series(study.root, study.points[0].run), range(4, 8), tokens_per_second=77.0)
    study.mirror(goes_along)
    assert study.steps() == list(range(1, 8))


@pytest.mark.parametrize("anew", [False, True], ids=["same mirror", "another mirror"])
def test_a_step_logged_again_by_a_later_attempt_keeps_its_first_time(
    study: Study, trunk: Any, anew: bool
) -> None:
    log_steps(trunk, [10, 20, 30], t=1000.0)
    tracker = study.tracker()
    study.mirror(tracker)
    log_steps(begin_series(study.root, study.points[0].run), [20, 30, 40], t=2000.0)
    study.mirror(study.tracker() if anew else tracker)
    assert [(step, when) for step, when, _ in study.history()] == [
        (10, 1000_000),
        (20, 1000_000),
        (30, 1000_000),
        (40, 2000_000),
    ]


@pytest.mark.parametrize("anew", [False, True], ids=["same mirror", "another mirror"])
def test_steps_between_those_already_sent_are_not_lost(study: Study, trunk: Any, anew: bool) -> None:
    log_steps(trunk, [10, 20, 30])
    tracker = study.tracker()
    study.mirror(tracker)
    log_steps(begin_series(study.root, study.points[0].run), [15, 20, 25])  # a later attempt that logs more
    study.mirror(study.tracker() if anew else tracker)
    assert study.steps() == [10, 15, 20, 25, 30]


def test_more_metrics_than_a_call_takes_arrive_each_once(study: Study, trunk: Any) -> None:
    log_steps(trunk, range(1, 421))
    study.mirror()
    assert study.steps() == list(range(1, 421)) == study.steps(key="grad_norm")


@pytest.mark.parametrize("call", ["create_run", "log_batch", "set_terminated"])
def test_a_call_that_failed_after_it_was_heard_is_not_repeated(study: Study, calls: Calls, call: str) -> None:
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
    for point in study.points:
        run = point.run
        assert study.steps(run.run_id) == list(range(run.iterations - 2, run.iterations + 1))
        assert study.steps(run.run_id, "final.loss") == [run.iterations]


def test_a_finished_run_costs_four_calls_and_afterwards_none(study: Study, calls: Calls) -> None:
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


def test_two_mirrors_at_once_make_one_run_of_each(study: Study) -> None:
    early = study.tracker()
    study.mirror(early)  # has looked, and seen nothing
    train(study.root, study.fields)
    study.mirror()
    study.mirror(early)
    assert len(list(early.experiment.search())) == 4


# -- what it says


def test_params_tags_and_files_tell_a_run_from_any_other(study: Study) -> None:
    train(study.root, study.fields)
    study.mirror()
    client = study.tracker().experiment.client
    (held,) = study.found(study.points[0].run.run_id)
    run = client.get_run(held.mlflow_id)
    assert run.data.params["model.architecture"] == "prefix_simba"
    assert run.data.params["optimiser.lr"] == "0.003"
    assert {"ssmscale.id", "ssmscale.dispatcher", "ssmscale.host", "ssmscale.job_id"} <= set(run.data.tags)
    assert run.data.tags["ssmscale.cluster"] == study.series_id
    assert run.data.metrics["final.loss"] > 0
    assert [file.path for file in client.list_artifacts(held.mlflow_id)] == ["run.json"]
    (parent,) = study.found()
    assert [file.path for file in client.list_artifacts(parent.mlflow_id)] == ["series.json"]
    assert run.data.tags["mlflow.parentRunId"] == parent.mlflow_id


def test_what_the_machine_did_has_the_names_mlflows_page_looks_for(study: Study, trunk: Any) -> None:
    trunk.append(
        Event.SYSTEM, step=10, cpu_percent=80.0, memory_gib=2.0, gpu_percent=50.0, gpu_memory_gib=1.0
    )
    study.mirror()
    (held,) = study.found()
    metrics = study.tracker().experiment.client.get_run(held.mlflow_id).data.metrics
    assert metrics["system/cpu_utilization_percentage"] == 80.0
    assert metrics["system/system_memory_usage_megabytes"] == pytest.approx(2147.48, abs=0.01)
    assert metrics["system/gpu_0_utilization_percentage"] == 50.0
    assert metrics["system/gpu_0_memory_usage_megabytes"] == pytest.approx(1073.74, abs=0.01)


def test_a_parameter_that_differs_in_mlflow_stops_nothing(study: Study, trunk: Any) -> None:
    study.mirror()
    (held,) = study.found()
    client = study.tracker().experiment.client
    client.log_param(held.mlflow_id, "a_field_of_another_version", "1")
    log_steps(trunk, [1])
    study.mirror()
    assert study.steps() == [1]


def test_a_run_made_without_its_parameters_gets_them(study: Study, trunk: Any, calls: Calls) -> None:
    study.tracker().experiment.create(
        study.series_id, "series", "name", 1, {"ssmscale.series": study.series_id}
    )  # what is left of a mirror that was killed then
    study.mirror()
    (held,) = study.found()
    assert held.has_params


def test_the_studys_files_are_kept_once_and_again_when_they_change(study: Study, calls: Calls) -> None:
    train(study.root, study.fields)
    study.mirror(settle=True)
    folder = study.root.study("tiny")
    (folder / "report").mkdir()
    (folder / "report" / "report.html").write_text("<p>first</p>")
    for text in ("<p>first</p>", "<p>first</p>", "<p>second</p>"):
        (folder / "report" / "report.html").write_text(text)
        study.mirror(settle=True, thorough=True)
    assert calls.made.count("log_artifact") == 3 + 1 + 2  # of the runs; study.json; the report twice
    (held,) = study.found("tiny")
    client = study.tracker().experiment.client
    assert {file.path for file in client.list_artifacts(held.mlflow_id)} == {"study.json", "report.html"}
    assert held.status == "FINISHED"


def test_a_run_never_ends_before_it_began_though_the_clock_was_set_back(study: Study) -> None:
    write_finished(study.root, study.points, steps=1)
    late = begin_run(study.root, study.points[0].run, t=2_000_000_000.0)
    finish(late, study.points[0].run, t=1_000_000_000.0)
    study.mirror()
    for held in study.tracker().experiment.search():
        assert held.end is not None
        assert held.end >= held.start


# -- settling


def test_a_run_nobody_trains_is_settled_as_killed_and_runs_again_when_it_does(study: Study) -> None:
    train(study.root, study.fields, StopAfter(3))
    tracker = study.tracker()
    study.mirror(tracker, settle=True)
    (parent,) = study.found()
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
        (held,) = study.found(identity)
        assert held.status == "FAILED"
        assert "loss is" in held.tags["ssmscale.reason"]


def test_a_process_of_another_host_is_not_called_dead_before_it_was_still_for_long(study: Study) -> None:
    journal = begin_series(study.root, study.points[0].run, host="elsewhere", t=time.time() - 9000)
    log_steps(journal, [1])
    study.mirror(settle=True)
    assert study.found()[0].status == "RUNNING"
    log_steps(journal, [2], t=time.time() - 5000)
    study.mirror(settle=True)  # the newest step is old
    assert study.found()[0].status == "KILLED"


def test_a_run_the_study_lists_no_more_is_settled_by_its_journal(study: Study) -> None:
    shorter, longer = study.points
    begin_series(study.root, shorter.run).close()
    log_steps(begin_run(study.root, longer.run), [9])
    study.mirror()
    log_steps(finished := begin_run(study.root, longer.run), [10])
    finish(finished, longer.run)
    study.fields["grid"]["iterations"] = [5]
    assert study.found(longer.run.run_id)[0].status == "RUNNING"
    assert study.mirror(settle=True, thorough=True).settled == 1
    (held,) = study.found(longer.run.run_id)
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
    assert study.found()[0].mlflow_id == parent.mlflow_id
    (held,) = study.found(run_id)
    assert (held.mlflow_id, held.status) == (child.mlflow_id, "FINISHED")
    assert study.steps(run_id) == [4, 5]
    assert study.steps(run_id, "lr") == [4, 5]
    for point in study.points:
        assert study.found(point.run.run_id)[0].tags["mlflow.parentRunId"] == parent.mlflow_id
    assert {one.tags["ssmscale.merged_into"] for one in study.found(run_id, deleted=True)} == {
        child.mlflow_id
    }
    assert study.mirror(settle=True, thorough=True).merged == 0


def test_a_run_deleted_in_mlflow_stays_deleted_and_is_named(study: Study) -> None:
    write_finished(study.root, study.points)
    study.mirror()
    run_id = study.points[0].run.run_id
    (held,) = study.found(run_id)
    client = study.tracker().experiment.client
    client.delete_run(held.mlflow_id)
    for _ in range(2):
        done = study.mirror(settle=True, thorough=True)
        assert any(run_id in note and "deleted" in note for note in done.notes)
        assert (len(study.found(run_id)), len(study.found(run_id, deleted=True))) == (0, 1)
    client.restore_run(held.mlflow_id)
    assert study.mirror(settle=True, thorough=True).notes == []


def test_sync_counts_no_run_that_was_deleted_in_mlflow(study: Study, ssmscale: Callable[..., Answer]) -> None:
    write_finished(study.root, study.points)
    sync = ("sync", "tiny", "--root", study.root.path)
    assert "2 finished runs are in" in ssmscale(*sync).out
    tracker = study.tracker()
    tracker.experiment.client.delete_run(study.found(study.points[1].run.run_id)[0].mlflow_id)
    answer = ssmscale(*sync)
    assert "1 of 2 finished runs are in" in answer.out
    assert "was deleted in MLflow" in answer.err


def test_a_run_deleted_while_it_trains_does_not_stop_the_others(study: Study, trunk: Any) -> None:
    log_steps(own := begin_run(study.root, study.points[0].run), [5])
    tracker = study.tracker()
    study.mirror(tracker)
    (held,) = study.found(study.points[0].run.run_id)
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


# -- the record of what is closed


def test_what_is_closed_is_not_asked_about_again(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    write_finished(study.root, study.points)
    study.mirror(settle=True)
    monkeypatch.setattr(Experiment, "search", None)
    monkeypatch.setattr(Experiment, "send", None)
    study.mirror(settle=True)


def test_a_store_made_anew_gets_everything(study: Study, empty_store: Any) -> None:
    write_finished(study.root, study.points)
    study.mirror(settle=True)
    from mlflow.tracking._tracking_service import utils

    (study.root.path / "mlflow.db").unlink()
    utils._tracking_store_registry._get_store_with_resolved_uri.cache_clear()
    study.mirror(settle=True)
    assert {held.status for held in study.tracker().experiment.search()} == {"FINISHED"}
    assert len(study.found(study.points[0].run.run_id)) == 1


def test_a_damaged_record_is_no_record(study: Study) -> None:
    write_finished(study.root, study.points)
    study.mirror(settle=True)
    (study.root.study("tiny") / "mirrored.json").write_text('{"store": ')
    study.mirror(settle=True)
    assert len(list(study.tracker().experiment.search())) == 4


def test_the_oldest_of_several_is_the_same_on_every_host() -> None:
    def held(mlflow_id: str, start: int, *, deleted: bool = False) -> Held:
        return Held("a", "run", mlflow_id, "RUNNING", start, None, {}, has_params=True, deleted=deleted)

    found = [held("c", 5), held("b", 5), held("a", 7), held("d", 1, deleted=True)]
    assert [one.mlflow_id for one in active(found)] == ["b", "c", "a"]
