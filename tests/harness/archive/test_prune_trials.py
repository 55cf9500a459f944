"""Pruning of a tuned study: the rules for checkpoints of runs hold for its trials too."""

from __future__ import annotations

import copy

import pytest

from harness.record import checkpoints
from harness.record.control import Control
from harness.record.journal import Event, read_progress
from harness.record.root import Root
from tests.conftest import Command, Write
from tests.harness.trainer import train
from tests.harness.tuner import tuned_here
from tests.studies import Fields


@pytest.fixture
def fields(study_fields: Fields) -> Fields:
    """Two trials that keep three checkpoints of their trunk each, and a study of a run without a trial's rate."""
    study_fields["grid"]["iterations"] = [10]
    study_fields["resources"] = {"checkpoint_every": 2, "keep_last": 3}
    study_fields["tune"] = {
        "sizes": ["xs"],
        "trials": 2,
        "search": {"optimiser.lr": {"choices": [0.01, 0.02]}},
        "sampler": "random",
    }
    return study_fields


def tags(root: Root, series_id: str) -> list[int]:
    return [held.marker.step for held in checkpoints.marked(root.series(series_id) / "checkpoints")]


def test_of_trials_the_newest_checkpoint_stays_and_the_older_go(
    fields: Fields, here: Root, ssmscale: Command, write_study: Write
) -> None:
    _, place = tuned_here(here, fields)
    trials = sorted({path.name for path in (here.path / "series").iterdir()})
    assert len(trials) == len(set(place.trained))
    before = {series_id: tags(here, series_id) for series_id in trials}
    assert all(len(steps) > 1 and steps[-1] == 8 for steps in before.values())
    train(here, fields)  # a study's own run, of another rate
    study = write_study(fields)
    told = ssmscale("prune", study, "--root", here.path, "--dry-run", "--json").document
    assert sorted(told["trials"]) == trials
    assert {series_id: tags(here, series_id) for series_id in trials} == before
    answer = ssmscale("prune", study, "--root", here.path)
    assert f"including {len(trials)} series of its tuning" in answer.out
    assert {series_id: tags(here, series_id) for series_id in trials} == {key: [8] for key in trials}
    assert {read_progress(here.run(run_id)).state for run_id in place.trained} == {Event.FINISHED}
    weights = list(here.path.glob("runs/*/checkpoints/model.safetensors"))
    assert len(weights) == len(trials) + 1


def test_the_checkpoint_of_an_unfinished_trial_stays(
    fields: Fields, here: Root, ssmscale: Command, write_study: Write
) -> None:
    fields["tune"]["trials"] = 1
    controller, place = tuned_here(here, fields)
    (run_id,) = place.trained
    (told,) = controller.records(next(iter(controller.searches)))
    longer = copy.deepcopy(fields)
    longer["training"]["optimiser"]["lr"] = told.values["training.optimiser.lr"]
    longer["grid"]["iterations"] = [20]
    train(here, longer)
    (series,) = (here.path / "series").iterdir()
    (journal,) = here.run(run_id).glob("journal/*")
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(line for line in lines if '"finished"' not in line))
    Control(here.study("tiny/tune") / "control.jsonl").append("cancelled", runs=[run_id])
    answer = ssmscale("prune", write_study(fields), "--root", here.path)
    assert f"run {run_id} leaves the trunk at or after it" in answer.out
    assert tags(here, series.name) == [8, 16]
