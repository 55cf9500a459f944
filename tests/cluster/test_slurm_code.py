"""On a real SLURM: the code that a queued job runs when the checkout is edited before it starts."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness.record.journal import Event
from harness.record.provenance import code_state, source_files
from slurm.devcluster.cluster import DevCluster
from tests.checkouts import make_checkout
from tests.cluster.conftest import missing
from tests.cluster.slurm_study import Make, SlurmStudy, held_back
from tests.harness.trainer import losses
from tests.studies import Fields, tiny_study
from tests.waiting import wait_until

pytestmark = pytest.mark.cluster

SHOW_RECIPE = "\nfrom harness import helper\n\nprint('recipe', helper.RECIPE, flush=True)\n"


@dataclass
class Edited:
    """A checkout from which studies are submitted and which is edited while their jobs wait."""

    checkout: Path
    with_copy: SlurmStudy
    without: SlurmStudy | None = None
    before: str = ""
    after: str = ""
    """State of the code when the studies were submitted, and when their jobs start."""

    def __post_init__(self) -> None:
        if shutil.which("rsync") is None:
            missing("no rsync on this machine")
        helper = self.checkout / "harness" / "helper.py"
        helper.write_text("RECIPE = 1\n")  # never added to git
        with (self.checkout / "harness" / "train" / "engine.py").open("a") as engine:
            engine.write(SHOW_RECIPE)
        self.before = code_state(source_files(self.checkout))
        with held_back(self.with_copy.slurm):
            said = self.with_copy.submit("--snapshot")
            assert f"--root {self.with_copy.root.path}" in said
            assert source_files(self.copy) == source_files(self.checkout)
            if self.without:
                self.without.submit()
            helper.write_text("RECIPE = 2\n")
            self.after = code_state(source_files(self.checkout))
            os.utime(self.copy, (0, 0))
            pruned = json.loads(self.with_copy.run("prune", "--json"))
            assert [kept["why"] for kept in pruned["kept"]] == ["a job in SLURM runs from it"]

    @property
    def copy(self) -> Path:
        """The copy that was made of the checkout."""
        return self.with_copy.root.study("tiny") / "code" / self.before

    def assert_trained_with_the_copy(self) -> None:
        study = self.with_copy
        assert len(losses(study.root, study.fields)) == 2
        assert recipes(study) == {"recipe 1"}
        assert {event["code"] for event in study.events(Event.STARTED, Event.RESUMED)} == {self.before}
        assert not warnings(study)
        assert self.copy.with_suffix(".json").exists()


def warnings(study: SlurmStudy) -> list[str]:
    """Return the jobs' warnings, but that they train on the CPU."""
    texts = [event["text"] for event in study.events(Event.WARNING)]
    return [text for text in texts if "SSMSCALE_DEVICE" not in text]


def recipes(study: SlurmStudy) -> set[str]:
    """Return what the jobs' code printed."""
    logs = [path for path in study.root.path.rglob("*") if path.suffix in {".log", ".out"}]
    lines = [line for path in logs for line in path.read_text(errors="replace").splitlines()]
    return {line for line in lines if line.startswith("recipe")}


@pytest.fixture(scope="module")
def edited(
    devcluster: DevCluster, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Edited]:
    """Two studies that were trained, one from a copy and one without."""
    folder = tmp_path_factory.mktemp("edited")
    checkout = make_checkout(folder / "checkout")
    studies = [
        SlurmStudy(devcluster, folder / name, tiny_study(tiny_corpus), code=checkout)
        for name in ("copied", "plain")
    ]
    try:
        found = Edited(checkout, *studies)
        studies[0].wait_until_over()
        yield found
    finally:
        studies[0].slurm("scancel", "--user=root")
        studies[0].wait_until_over()


def test_queued_jobs_run_from_the_copy_that_was_made_when_they_were_submitted(edited: Edited) -> None:
    edited.assert_trained_with_the_copy()
    pruned = json.loads(edited.with_copy.run("prune", "--json"))
    assert f"code {edited.before}" in {gone["owner"] for gone in pruned["removed"]}
    assert not edited.copy.exists()


def test_without_a_copy_a_job_warns_that_its_code_is_not_what_was_submitted(edited: Edited) -> None:
    study = edited.without
    assert study is not None
    assert len(losses(study.root, study.fields)) == 2
    assert recipes(study) == {"recipe 2"}
    (warning,) = warnings(study)
    assert edited.before in warning
    assert edited.after in warning
    assert {event["code"] for event in study.events(Event.STARTED)} == {edited.after}


@pytest.mark.verify
def test_a_requeued_job_runs_from_the_same_copy(make: Make, study_fields: Fields, tmp_path: Path) -> None:
    study_fields["grid"]["iterations"] = [5, 800]
    study_fields["resources"] = {"checkpoint_every": 50}
    study_fields["tracking"]["log_every"] = 10
    checkout = make_checkout(tmp_path / "checkout")
    study = make(study_fields, code=checkout)
    edited = Edited(checkout, study)
    study.wait_for_step(20)
    study.slurm("scontrol", "requeue", study.queue()[0].split()[0])
    wait_until(lambda: study.count(Event.RESUMED) >= 1)
    study.wait_until_over()
    edited.assert_trained_with_the_copy()
