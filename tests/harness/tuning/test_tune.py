"""`ssmscale tune` as a user runs it: with real workers, killed and restarted, and twice at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from harness.record.journal import Event, read_progress
from harness.record.root import Root
from harness.tracking.store import default_uri
from harness.tuning.storage import in_control
from tests.conftest import Answer, Command
from tests.harness.rays import WITHOUT_DASHBOARD, WITHOUT_MLFLOW
from tests.harness.tracked import mlflow_runs
from tests.harness.tuner import Fields
from tests.studies import tiny_study
from tests.waiting import PATIENCE, wait_until

TRIALS = 2


def tune_fields(corpus: Path) -> Fields:
    """A study that leaves its rate to tuning at one size of two, trained by one worker."""
    fields = tiny_study(corpus)
    fields["grid"] |= {
        "iterations": [5],
        "sizes": {"xs": {"n_blocks": 1, "d_model": 16}, "s": {"n_blocks": 1, "d_model": 24}},
    }
    fields["training"]["optimiser"]["lr"] = "tuned"
    fields["tracking"] |= {"log_every": 20}
    fields["resources"] = {"jobs": 1}
    fields["tune"] = {
        "sizes": ["xs", "s"],
        "trials": TRIALS,
        "search": {"optimiser.lr": {"low": 1e-3, "high": 3e-1, "log": True}},
    }
    return fields


def tune(folder: Path, program: str, on: str, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, "tune", "study.yaml", "--on", on, *options]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished_runs(root: Root) -> set[Path]:
    return {run for run in root.path.glob("runs/*") if read_progress(run).state == Event.FINISHED}


def journals_of(runs: set[Path]) -> dict[Path, bytes]:
    return {path: path.read_bytes() for run in runs for path in run.glob("journal/*")}


class Story(NamedTuple):
    """A tuning that was killed after a trial, and restarted on a Ray of its own."""

    root: Root
    before: dict[Path, bytes]
    end: Answer


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path, empty_store: Path) -> Story:
    folder = tmp_path_factory.mktemp("tune")
    root, fields = Root(folder / "runs"), tune_fields(tiny_corpus)
    root.path.mkdir()
    (root.path / "mlflow.db").write_bytes(empty_store.read_bytes())
    (folder / "study.yaml").write_text(yaml.safe_dump(fields), encoding="utf-8")
    first = tune(folder, WITHOUT_MLFLOW + WITHOUT_DASHBOARD, "local")
    try:
        wait_until(lambda: finished_runs(root), on=first)
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    before = journals_of(finished_runs(root))
    last = tune(folder, WITHOUT_DASHBOARD, "ray", "--json")
    out, err = last.communicate(timeout=PATIENCE)
    return Story(root, before, Answer(last.returncode, out, err))


def test_tuning_ends_with_a_result_of_every_trial_and_the_rates_kept(story: Story) -> None:
    cells = story.end.document["cells"]
    assert [sum(cell["trials"].values()) for cell in cells] == [TRIALS] * 2
    tuned = json.loads((story.root.study("tiny") / "tuned.json").read_text())
    rates = {size["size"]: size["lr"] for size in tuned["architectures"]["prefix_simba"]["sizes"]}
    assert rates == {cell["size"]: cell["lr"] for cell in cells}
    assert all(1e-3 <= rate <= 3e-1 for rate in rates.values())


def test_killed_and_restarted_it_repeats_no_finished_trial(story: Story) -> None:
    assert story.before
    assert {path: path.read_bytes() for path in story.before} == story.before
    assert journals_of({path.parent.parent for path in story.before}) == story.before
    runs = [*story.root.path.glob("runs/*/run.json")]
    assert len(runs) == len(finished_runs(story.root)) <= 2 * TRIALS


def test_a_second_tuning_at_once_is_refused_with_the_process_to_wait_for(
    story: Story, ssmscale: Command
) -> None:
    with in_control(story.root.study("tiny") / "tune", "study tiny"):
        place = ("--root", story.root.path, "--on", "local")
        said = ssmscale("tune", story.root.path.parent / "study.yaml", *place)
    said.assert_refused(f"study tiny: is being tuned by process {os.getpid()} on")
    assert len(said.err.splitlines()) == 1


def test_the_tuned_study_is_planned_with_what_was_found(story: Story, ssmscale: Command) -> None:
    said = ssmscale("plan", story.root.path.parent / "study.yaml", "--root", story.root.path, "--json")
    assert len(said.document["runs"]) == 2


def test_trials_are_mirrored_with_number_and_state(story: Story) -> None:
    runs = mlflow_runs(default_uri(story.root), "tiny/tune")
    held = [run.data.tags for run in runs if run.data.tags["ssmscale.kind"] == "run"]
    assert {tags["ssmscale.id"] for tags in held} == {folder.name for folder in finished_runs(story.root)}
    assert {(tags["tune.study"], tags["tune.state"]) for tags in held} == {("tiny", "finished")}
    numbers = {(tags["ssmscale.size"], int(tags["tune.trial"])) for tags in held}
    assert numbers <= {(size, number) for size in ("xs", "s") for number in range(2 * TRIALS)}
