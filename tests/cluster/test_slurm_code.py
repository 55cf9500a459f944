"""On a real SLURM: which code a queued job runs when the checkout is edited before it starts."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from harness.record.journal import Event
from harness.record.provenance import code_state, source_files
from tests.checkouts import make_checkout
from tests.cluster.conftest import missing
from tests.cluster.slurm_study import Make, SlurmStudy, held_back
from tests.harness.journals import read_events
from tests.harness.trainer import losses
from tests.waiting import wait_until

pytestmark = pytest.mark.cluster


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return make_checkout(tmp_path / "checkout")


def told(study: SlurmStudy, *events: Event) -> list[dict[str, Any]]:
    folders = [*study.root.path.glob("series/*"), *study.root.path.glob("runs/*")]
    return [found for folder in folders for found in read_events(folder) if found["event"] in events]


def submit_and_edit(make: Make, fields: dict[str, Any], checkout: Path) -> tuple[SlurmStudy, str]:
    """Submit with a copy, and break the checkout while the job waits; returns the study and the submitted state."""
    if shutil.which("rsync") is None:
        missing("no rsync on this machine")
    (checkout / "harness" / "helper.py").write_text("RECIPE = 1\n")  # never added to git
    worker = checkout / "harness" / "worker.py"
    worker.write_text(worker.read_text() + "\nfrom harness import helper\n")
    submitted = code_state(source_files(checkout))
    study = make(fields, code=checkout)
    with held_back(study.slurm):
        said = study.submit("--snapshot")
        assert f"--root {study.root.path}" in said
        assert source_files(copy_of(study, submitted)) == source_files(checkout)
        (checkout / "harness" / "helper.py").unlink()
        for name in ("worker", "slurm_job"):
            source = checkout / "harness" / f"{name}.py"
            source.write_text("raise SystemExit('edited while jobs wait')\n")
        os.utime(copy_of(study, submitted), (0, 0))
        pruned = json.loads(study.run("prune", "--json"))
        assert [kept["why"] for kept in pruned["kept"]] == ["a job in SLURM runs from it"]
    return study, submitted


def copy_of(study: SlurmStudy, state: str) -> Path:
    return study.root.study("tiny") / "code" / state


def assert_trained_with(study: SlurmStudy, fields: dict[str, Any], state: str) -> None:
    assert len(losses(study.root, fields)) == 2
    assert {event["code"] for event in told(study, Event.STARTED, Event.RESUMED)} == {state}
    assert not told(study, Event.WARNING)
    assert copy_of(study, state).with_suffix(".json").exists()


def test_queued_jobs_run_from_the_copy_that_was_made_when_they_were_submitted(
    make: Make, study_fields: dict[str, Any], checkout: Path
) -> None:
    study, submitted = submit_and_edit(make, study_fields, checkout)
    study.wait_until_over()
    assert_trained_with(study, study_fields, submitted)
    pruned = json.loads(study.run("prune", "--json"))
    assert f"code {submitted}" in {gone["owner"] for gone in pruned["removed"]}
    assert not copy_of(study, submitted).exists()


@pytest.mark.verify
def test_a_requeued_job_runs_from_the_same_copy(
    make: Make, study_fields: dict[str, Any], checkout: Path
) -> None:
    study_fields["grid"]["iterations"] = [5, 800]
    study_fields["resources"] = {"checkpoint_every": 50}
    study_fields["tracking"]["log_every"] = 10
    study, submitted = submit_and_edit(make, study_fields, checkout)
    study.wait_for_step(20)
    study.slurm("scontrol", "requeue", study.queue()[0].split()[0])
    wait_until(lambda: study.count(Event.RESUMED) >= 1)
    study.wait_until_over()
    assert_trained_with(study, study_fields, submitted)


def test_without_a_copy_a_job_says_that_its_code_is_not_what_was_submitted(
    make: Make, study_fields: dict[str, Any], checkout: Path
) -> None:
    submitted = code_state(source_files(checkout))
    study = make(code=checkout)
    with held_back(study.slurm):
        study.submit()
        source = checkout / "harness" / "worker.py"
        source.write_text(source.read_text() + "\n# edited while jobs wait\n")
    study.wait_until_over()
    assert len(losses(study.root, study_fields)) == 2
    (warning,) = told(study, Event.WARNING)
    edited = code_state(source_files(checkout))
    assert submitted in warning["text"]
    assert edited in warning["text"]
    assert {event["code"] for event in told(study, Event.STARTED)} == {edited}
