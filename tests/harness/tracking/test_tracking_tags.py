"""A mirrored run's parameters, tags and files, and the ledger of finished Series."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from harness.record.journal import Event
from harness.record.root import Root
from harness.tracking.experiment import Held
from harness.tracking.series import active
from tests.conftest import files_below
from tests.harness.journals import begin_run, finish, log_steps, write_finished
from tests.harness.tracked import Calls, Study


def test_params_tags_and_files_identify_a_run(study: Study) -> None:
    write_finished(study.root, study.points)
    study.mirror()
    client = study.tracker().experiment.client
    held = study.the(study.points[0].run.run_id)
    run = client.get_run(held.mlflow_id)
    assert run.data.params["model.architecture"] == "prefix_simba"
    assert run.data.params["optimiser.lr"] == "0.003"
    assert {"ssmscale.id", "ssmscale.dispatcher", "ssmscale.host", "ssmscale.job_id"} <= set(run.data.tags)
    assert run.data.tags["ssmscale.cluster"] == study.series_id
    assert run.data.metrics["final.loss"] > 0
    assert [file.path for file in client.list_artifacts(held.mlflow_id)] == ["run.json"]
    parent = study.the()
    assert [file.path for file in client.list_artifacts(parent.mlflow_id)] == ["series.json"]
    assert run.data.tags["mlflow.parentRunId"] == parent.mlflow_id


def test_what_the_machine_did_has_the_names_mlflows_page_looks_for(study: Study, trunk: Any) -> None:
    trunk.append(
        Event.SYSTEM, step=10, cpu_percent=80.0, memory_gib=2.0, gpu_percent=50.0, gpu_memory_gib=1.0
    )
    study.mirror()
    held = study.the()
    metrics = study.tracker().experiment.client.get_run(held.mlflow_id).data.metrics
    assert metrics["system/cpu_utilization_percentage"] == 80.0
    assert metrics["system/system_memory_usage_megabytes"] == pytest.approx(2147.48, abs=0.01)
    assert metrics["system/gpu_0_utilization_percentage"] == 50.0
    assert metrics["system/gpu_0_memory_usage_megabytes"] == pytest.approx(1073.74, abs=0.01)


def test_a_parameter_that_differs_in_mlflow_stops_nothing(study: Study, trunk: Any) -> None:
    study.mirror()
    held = study.the()
    study.tracker().experiment.client.log_param(held.mlflow_id, "a_field_of_another_version", "1")
    log_steps(trunk, [1])
    study.mirror()
    assert study.steps() == [1]


def test_a_run_created_without_its_parameters_gets_them(study: Study, trunk: Any) -> None:
    tags = {"ssmscale.series": study.series_id}
    study.tracker().experiment.create(study.series_id, "series", "name", 1, tags)
    study.mirror()
    assert study.the().has_params


def test_the_studys_files_are_sent_once_and_again_when_they_change(study: Study, calls: Calls) -> None:
    write_finished(study.root, study.points)
    study.mirror(settle=True)
    report = study.root.study("tiny") / "report" / "report.html"
    report.parent.mkdir()
    for text in ("<p>first</p>", "<p>first</p>", "<p>second</p>"):
        report.write_text(text)
        study.mirror(settle=True, thorough=True)
    assert calls.made.count("log_artifact") == 3 + 1 + 2  # of the runs; study.json; the report twice
    held = study.the("tiny")
    client = study.tracker().experiment.client
    assert {file.path for file in client.list_artifacts(held.mlflow_id)} == {"study.json", "report.html"}
    assert held.status == "FINISHED"


def test_a_password_in_an_older_studys_file_is_not_sent(study: Study) -> None:
    write_finished(study.root, study.points)
    path = study.root.study("tiny") / "study.json"
    document = json.loads(path.read_text()) | {"tracking": {"uri": "http://me:s3cret@tracker.example.org"}}
    path.write_text(json.dumps(document))
    study.mirror(settle=True)
    held, client = study.the("tiny"), study.tracker().experiment.client
    sent = Path(client.download_artifacts(held.mlflow_id, "study.json")).read_text()
    assert json.loads(sent)["tracking"] == {"uri": "http://me@tracker.example.org"}


def test_a_run_never_ends_before_it_began_though_the_clock_was_set_back(study: Study) -> None:
    write_finished(study.root, study.points, steps=1)
    late = begin_run(study.root, study.points[0].run, t=2_000_000_000.0)
    finish(late, study.points[0].run, t=1_000_000_000.0)
    study.mirror()
    for held in study.tracker().experiment.search():
        assert held.end is not None
        assert held.end >= held.start


def test_a_store_created_anew_gets_everything(study: Study, empty_store: Any) -> None:
    write_finished(study.root, study.points)
    study.mirror(settle=True)
    from mlflow.tracking._tracking_service import utils

    (study.root.path / "mlflow.db").unlink()
    utils._tracking_store_registry._get_store_with_resolved_uri.cache_clear()
    study.mirror(settle=True)
    assert {held.status for held in study.tracker().experiment.search()} == {"FINISHED"}
    assert len(study.found(study.points[0].run.run_id)) == 1


def test_a_damaged_ledger_is_ignored(study: Study) -> None:
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


# -- a ROOT that is moved


def files_of(study: Study) -> list[list[str]]:
    """Return the names of the files of every run in the experiment, in the order of the runs' ids."""
    experiment = study.tracker().experiment
    held = sorted(experiment.search(), key=lambda one: one.mlflow_id)
    return [[file.path for file in experiment.client.list_artifacts(one.mlflow_id)] for one in held]


@pytest.mark.parametrize("how", ["moved", "copied"])
@pytest.mark.parametrize("name", ["elsewhere", "a b", "a?b%20c"])
def test_the_files_of_runs_follow_a_root_that_is_moved_or_copied(
    study: Study, tmp_path: Path, how: str, name: str
) -> None:
    write_finished(study.root, study.points[:1])
    study.mirror(settle=True)
    files = files_of(study)
    assert sorted(files) == [["run.json"], ["series.json"], ["study.json"]]
    before, place = study.root.path, tmp_path / name
    (shutil.move if how == "moved" else shutil.copytree)(before, place)
    kept = files_below(before)
    new = Study(Root(place), study.fields)
    assert files_of(new) == files
    write_finished(new.root, new.points[1:])
    new.mirror(settle=True, thorough=True)
    assert all(files_of(new))
    assert len(files_of(new)) == 4
    assert files_below(before) == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        {name, "runs"} if how == "copied" else {name}
    )


def test_the_files_of_another_root_stay_where_they_are(study: Study, tmp_path: Path) -> None:
    other = Study(Root(tmp_path / "other"), study.fields, study.uri)
    write_finished(other.root, other.points)
    other.mirror(settle=True)
    files = files_of(other)
    assert all(files)
    write_finished(study.root, study.points)
    study.mirror(settle=True, thorough=True)
    assert files_of(other) == files
