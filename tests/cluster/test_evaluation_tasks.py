"""On a real SLURM: runs are evaluated by tasks, one of which is killed, with the scores of one process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness.dispatch.arrays import Array, ArrayStore
from harness.dispatch.part import Part
from harness.record.journal import Event
from harness.record.registry import open_study
from harness.record.scores import evaluation_folder, evaluation_rows
from harness.tracking.experiment import ID
from harness.tracking.store import default_uri
from harness.tracking.tracker import Tracker
from tests.cluster.slurm_study import Make, SlurmStudy, held_back
from tests.harness.journals import read_events
from tests.studies import Fields, with_iterations
from tests.waiting import wait_until

pytestmark = pytest.mark.cluster


def test_runs_are_evaluated_after_training_and_by_tasks_of_which_one_is_killed(
    make: Make, study_fields: Fields, empty_store: Path
) -> None:
    fields = with_iterations(study_fields, *range(5, 29))
    study = make(fields)
    study.root.path.mkdir(parents=True)
    shutil.copy(empty_store, study.root.path / "mlflow.db")

    with held_back(study.slurm):
        said = study.submit("--then", "evaluate")
        assert "1 task submitted to dev" in said
        assert "24 by tasks that wait or run" in said
        assert f"afterany:{study.arrays()[0].job_id}" in study.slurm("squeue", "--noheader", "--format=%E")
        assert "1 task submitted" not in study.submit("--then", "evaluate")
    study.wait_until_over()
    (chained,) = evaluations(study)
    assert chained.after == (study.arrays()[0].job_id,)
    alone = scores(study)
    assert len({run_id for run_id, _, settings in alone if settings != "held-out"}) == 24

    # What one process has evaluated is forgotten, and tasks share the runs.
    (settings,) = {settings for _, _, settings in alone if settings != "held-out"}
    forget(study, settings)
    assert settings not in {place for _, _, place in scores(study)}
    tasks = (*study.target(), "--parts", "4", "--json")
    with held_back(study.slurm):
        assert outcomes(study, *tasks) == {"queued"}
        assert outcomes(study, *tasks) == {"queued"}
        assert pieces(study)["written"] == 0
        assert pieces(study)["submitted"] == []
    (_, array) = evaluations(study)
    assert len(array.tasks) == 4
    wait_until(lambda: kill_one(array), at_once=True)
    study.wait_until_over()
    starts = [len(events(part, Event.STARTED, Event.RESUMED)) for part in array.tasks]
    assert sorted(starts) == [1, 1, 1, 2]
    assert outcomes(study, *tasks) == {"kept"}
    assert scores(study) == alone
    assert [piece["prompt"] for piece in pieces(study)["pieces"]] == ["A tone", "Two tones"]
    for run_id, held in mlflow(study).items():
        ours = {
            f"eval/{place}/{metric}": value for (run, metric, place), value in alone.items() if run == run_id
        }
        assert held == {name: [value] for name, value in ours.items()}


def evaluations(study: SlurmStudy) -> list[Array]:
    """Return the arrays of evaluations, oldest first."""
    return list(ArrayStore(study.root.study(study.fields["name"]) / "evaluate").read().values())


def scores(study: SlurmStudy) -> dict[tuple[str, str, str], float]:
    """Return the value of each run, metric and settings."""
    rows = evaluation_rows(open_study(str(study.study), study.root.path, None))
    return {(row.run_id, row.metric, row.settings): row.value for row in rows}


def outcomes(study: SlurmStudy, *options: str) -> set[str]:
    return {run["outcome"] for run in json.loads(study.run("evaluate", *options))["runs"]}


def forget(study: SlurmStudy, settings: str) -> None:
    """Remove the results of these settings and all that was generated, of every run."""
    for run in (study.root.path / "runs").iterdir():
        folder = evaluation_folder(study.root, run.name)
        (folder / f"{settings}.json").unlink()
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)


def pieces(study: SlurmStudy) -> Any:
    """Have tasks generate two pieces with a run; return the command's document."""
    (study.folder / "prompts.txt").write_text("A tone\nTwo tones\n")
    run = min(path.name for path in (study.root.path / "runs").iterdir())
    files = ("--prompts", str(study.folder / "prompts.txt"), "--out", str(study.folder / "pieces"))
    where = ("--root", str(study.root.path), *study.target(), "--json")
    answer = study.call_words("generate", run, *files, *where)
    assert answer.status == 0, answer.out + answer.err
    return json.loads(answer.out)


def events(part: Any, *kinds: Event) -> list[dict[str, Any]]:
    return [event for event in read_events(part.folder) if event["event"] in kinds]


def kill_one(array: Array) -> bool:
    """Kill the process of one task that works; return False if none does yet."""
    for part in array.tasks:
        assert isinstance(part, Part)
        if (part.folder / "journal").is_dir() and (started := events(part, Event.STARTED)):
            psutil.Process(started[0]["pid"]).kill()
            return True
    return False


def mlflow(study: SlurmStudy) -> dict[str, dict[str, list[float]]]:
    """Return the values of each metric of evaluations that MLflow holds, by run."""
    name = study.fields["name"]
    experiment = Tracker(default_uri(study.root), name, study.root).experiment
    found: dict[str, dict[str, list[float]]] = {}
    for run in (study.root.path / "runs").iterdir():
        (held,) = experiment.search(ID, run.name)
        names = [
            key for key in experiment.client.get_run(held.mlflow_id).data.metrics if key.startswith("eval/")
        ]
        found[run.name] = {
            key: [one.value for one in experiment.client.get_metric_history(held.mlflow_id, key)]
            for key in names
        }
    return found
