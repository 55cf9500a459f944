"""MLflow mirrors the journals: everything once, at the journal's time, whatever happens to the tracker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness.journal import read_events
from harness.rundir import Root
from harness.status import RunStatus, StatusReader
from harness.study import Study
from harness.submission import resolve
from harness.tracking import MirrorThread, Tracker, default_uri
from harness.validation import validate
from tests.harness.trainer import StopAfter, series_folder, train

Fields = dict[str, Any]


@pytest.fixture
def root(tmp_path: Path, empty_store: Path) -> Root:
    root = Root(tmp_path / "runs")
    root.path.mkdir()
    (root.path / "mlflow.db").write_bytes(empty_store.read_bytes())
    return root


def rows_of(root: Root, fields: Fields) -> list[RunStatus]:
    return StatusReader(root, "tiny").read(resolve(validate(Study, fields, "t"), root, "t").points)


def history(tracker: Tracker, mlflow_id: str, key: str) -> list[tuple[int, int, float]]:
    held = tracker._client.get_metric_history(mlflow_id, key)
    return [(metric.step, metric.timestamp, metric.value) for metric in held]


def by_kind(tracker: Tracker, kind: str) -> list[Any]:
    return list(tracker._search("ssmscale.kind", kind))


def test_every_step_is_mirrored_once_with_the_journals_time(root: Root, study_fields: Fields) -> None:
    train(root, study_fields)
    for _ in range(2):  # by two processes, one after the other
        tracker = Tracker(default_uri(root), "tiny", root)
        tracker.mirror(rows_of(root, study_fields))
    (parent,) = by_kind(tracker, "series")
    told = [
        (event["step"], int(event["t"] * 1000), event["loss"])
        for event in read_events(series_folder(root))
        if event["event"] == "step"
    ]
    assert history(tracker, parent.info.run_id, "train_loss") == told
    assert len(by_kind(tracker, "run")) == 2


def test_what_was_mirrored_half_way_is_completed_and_not_repeated(root: Root, study_fields: Fields) -> None:
    train(root, study_fields, StopAfter(3))
    first = Tracker(default_uri(root), "tiny", root)
    first.mirror(rows_of(root, study_fields))
    (parent,) = by_kind(first, "series")
    assert [step for step, *_ in history(first, parent.info.run_id, "train_loss")] == [1, 2, 3]
    train(root, study_fields)
    again = Tracker(default_uri(root), "tiny", root)
    again.mirror(rows_of(root, study_fields))
    (parent,) = by_kind(again, "series")
    assert [step for step, *_ in history(again, parent.info.run_id, "train_loss")] == list(range(1, 9))
    assert parent.info.status == "FINISHED"


def test_an_evaluation_journalled_after_its_step_was_mirrored_is_not_lost(
    root: Root, study_fields: Fields
) -> None:
    from harness.journal import Event, Journal
    from tests.harness.trainer import prepared

    prepared(root, study_fields)
    journal = Journal.open(series_folder(root))
    journal.append(Event.STARTED)
    journal.append(Event.STEP, step=4, loss=3.0)
    tracker = Tracker(default_uri(root), "tiny", root)
    tracker.mirror(rows_of(root, study_fields))
    journal.append(Event.EVAL, step=4, loss=3.5)
    tracker.mirror(rows_of(root, study_fields))
    (parent,) = by_kind(tracker, "series")
    assert [step for step, *_ in history(tracker, parent.info.run_id, "valid_loss")] == [4]


def test_two_mirrors_at_once_make_one_run_of_each(root: Root, study_fields: Fields) -> None:
    early = Tracker(default_uri(root), "tiny", root)
    early.mirror(rows_of(root, study_fields))  # has looked, and seen nothing
    train(root, study_fields)
    Tracker(default_uri(root), "tiny", root).mirror(rows_of(root, study_fields))
    early.mirror(rows_of(root, study_fields))
    assert len(list(early._search())) == 3


def test_points_come_back_as_they_were_journalled(root: Root, study_fields: Fields) -> None:
    train(root, study_fields)
    rows = rows_of(root, study_fields)
    tracker = Tracker(default_uri(root), "tiny", root)
    tracker.mirror(rows)
    points = tracker.points([row.run_id for row in rows])
    assert [(point.run_id, point.iterations, point.loss) for point in points] == [
        (row.run_id, row.point.run.iterations, row.loss) for row in rows
    ]
    assert len({point.cluster for point in points}) == 1
    assert all(isinstance(point.tokens, int) and point.annealed for point in points)


def test_a_run_nobody_trains_is_settled_as_killed_and_runs_again_when_it_does(
    root: Root, study_fields: Fields
) -> None:
    train(root, study_fields, StopAfter(3))
    tracker = Tracker(default_uri(root), "tiny", root)
    tracker.mirror(rows_of(root, study_fields), settle=True)
    (parent,) = by_kind(tracker, "series")
    assert parent.info.status == "KILLED"
    assert "interrupted" in parent.data.tags["ssmscale.reason"]
    train(root, study_fields)
    tracker.mirror(rows_of(root, study_fields), settle=True)
    assert {run.info.status for run in tracker._search()} == {"FINISHED"}


def test_a_failed_run_is_failed_in_mlflow_with_its_reason(root: Root, study_fields: Fields) -> None:
    study_fields["training"]["optimiser"] = {"lr": 1e5, "grad_clip": None}
    train(root, study_fields)
    tracker = Tracker(default_uri(root), "tiny", root)
    tracker.mirror(rows_of(root, study_fields), settle=True)
    for run in by_kind(tracker, "run"):
        assert run.info.status == "FAILED"
        assert "loss is" in run.data.tags["ssmscale.reason"]


def test_params_and_tags_tell_a_run_from_any_other(root: Root, study_fields: Fields) -> None:
    train(root, study_fields)
    tracker = Tracker(default_uri(root), "tiny", root)
    tracker.mirror(rows_of(root, study_fields))
    run = by_kind(tracker, "run")[0]
    assert run.data.params["model.architecture"] == "prefix_simba"
    assert run.data.params["optimiser.lr"] == "0.003"
    assert {"ssmscale.id", "ssmscale.series", "ssmscale.dispatcher", "ssmscale.host"} <= set(run.data.tags)
    assert run.data.metrics["final.loss"] > 0


def test_a_tracker_that_is_gone_costs_one_warning_and_nothing_else(
    root: Root, study_fields: Fields, caplog: pytest.LogCaptureFixture
) -> None:
    train(root, study_fields)
    thread = MirrorThread("http://127.0.0.1:9", "tiny", root, every_seconds=0.01)
    thread.start()
    thread.finish(rows_of(root, study_fields))
    assert thread.problem is not None
    assert (
        len([record for record in caplog.records if "journals keep everything" in record.getMessage()]) == 1
    )
    back = Tracker(default_uri(root), "tiny", root)
    back.mirror(rows_of(root, study_fields))
    assert len(back.points([row.run_id for row in rows_of(root, study_fields)])) == 2
