"""Submitting a study of which other submissions hold Series: it leaves them, or waits for their jobs."""

from __future__ import annotations

import os
import re
import shlex
import time
from contextlib import chdir
from pathlib import Path

import pytest
import yaml

from harness.common.process import identify_process
from harness.common.validation import validate
from harness.dispatch.arrays import ArrayStore
from harness.dispatch.base import SubmitTarget
from harness.dispatch.registry import open_backend
from harness.record.jobs import SchedulerUnavailable
from harness.record.journal import read_progress
from harness.record.registry import resolve
from harness.record.root import Root, read_launch
from harness.record.series import WorkList
from harness.study.schema import Study
from harness.submit import cancel
from harness.submit.leases import Lease, Leases, acquire
from harness.submit.monitor import planned
from harness.submit.submission import Submission
from tests.cluster.slurm_study import PROFILE
from tests.conftest import Answer, Command
from tests.programs import write_program
from tests.studies import Fields

SQUEUE = """\
state=$(head -n 1 {place}/states)
if [ "$(wc -l <{place}/states)" -gt 1 ]; then sed -i 1d {place}/states; fi
for array in {root}/studies/*/arrays/ssmscale-*.json; do
    if [ -f "$array" ]; then echo "77_0|$(basename "$array" .json)|$state|0:07|n1|None"; fi
done
"""


@pytest.fixture
def states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put programs of SLURM's names on PATH; squeue tells of every job the states in this file, one a call."""
    place = tmp_path / "bin"
    write_program(place / "squeue", SQUEUE.format(place=place, root=tmp_path / "runs"))
    answers = {"sbatch": "echo Submitted batch job 77", "sinfo": "echo low", "scancel": "", "sacct": "exit 1"}
    for name, script in answers.items():
        write_program(place / name, script)
    monkeypatch.setenv("PATH", str(place), prepend=os.pathsep)
    (place / "states").write_text("RUNNING\n", encoding="utf-8")
    return place / "states"


class Here:
    """A study that is handed to SLURM's programs and asked after, all from one machine."""

    def __init__(self, root: Root, fields: Fields, states: Path, ssmscale: Command) -> None:
        self.root, self.fields = root, fields
        self._study, self._profile = root.path.parent / "study.yaml", root.path.parent / "dev.yaml"
        self._states, self._ssmscale = states, ssmscale
        self._profile.write_text(yaml.safe_dump(PROFILE), encoding="utf-8")

    def submit(self, on: str = "slurm") -> Answer:
        """Submit the study as its fields are by now; it must be accepted."""
        cluster = ("--cluster", str(self._profile)) if on == "slurm" else ()
        said = self.ask("submit", "--on", on, *cluster)
        assert said.status == 0, said.err
        return said

    def ask(self, verb: str, *options: str) -> Answer:
        return self._ssmscale(verb, self.study, *options, "--root", str(self.root.path))

    @property
    def study(self) -> Path:
        self._study.write_text(yaml.safe_dump(self.fields), encoding="utf-8")
        return self._study

    def slurm_says(self, *states: str) -> None:
        """The state of every job, one a question; the last one stays."""
        self._states.write_text("".join(f"{state}\n" for state in states), encoding="utf-8")

    def slurm_is_silent(self) -> None:
        write_program(self._states.parent / "squeue", "echo no controller >&2; exit 1")


@pytest.fixture
def here(tracked_root: Root, study_fields: Fields, states: Path, ssmscale: Command) -> Here:
    return Here(tracked_root, study_fields, states, ssmscale)


def test_a_series_that_another_study_has_leased_keeps_its_launch_settings(here: Here) -> None:
    (point, *_) = resolve(validate(Study, here.fields, "test"), here.root, "test").points
    folder = here.root.series(point.series_id)
    folder.mkdir(parents=True)
    (folder / "launch.json").write_text("theirs", encoding="utf-8")
    theirs = Lease(study="theirs", array="ssmscale-a", process=identify_process(), t=time.time())
    acquire(folder, theirs)
    said = here.submit()
    assert "2 runs join 1 job of study theirs, which trains their trunk" in said.out
    assert "nothing of tiny is left to submit" not in said.out
    assert (folder / "launch.json").read_text(encoding="utf-8") == "theirs"


def test_a_series_that_a_job_holds_is_shown_as_queued_and_left_to_it_by_a_submission_here(
    here: Here, ssmscale: Command, tmp_path: Path
) -> None:
    here.fields["grid"]["iterations"] = [5]
    here.submit()
    here.slurm_says("PENDING")
    left = r"1 series left to jobs of study tiny; see `ssmscale (.*)`"
    said = here.submit("local")
    assert "1 queued" in said.out
    (command,) = re.findall(left, said.out)
    (elsewhere := tmp_path / "elsewhere").mkdir()
    with chdir(elsewhere):
        assert "1 queued" in ssmscale(*shlex.split(command)).out  # typed as it is printed
    (folder,) = (here.root.path / "series").iterdir()
    before = (folder / "launch.json").read_bytes()
    here.fields |= {"name": "other", "grid": {**here.fields["grid"], "seeds": [0, 1]}}
    said = here.submit("local")
    assert "1 done" in said.out
    assert re.search(left, said.out)
    assert (folder / "launch.json").read_bytes() == before
    # That job trains it also if its own study cancels it.
    (request,) = WorkList(here.root, folder.name).requests()
    assert request.study == "other"
    assert read_progress(folder).attempt == 0


def test_a_series_whose_job_ends_untrained_while_it_is_left_to_it_is_trained_here(here: Here) -> None:
    here.fields["grid"]["iterations"] = [5]
    here.submit()
    # Once for the lease; by the time all else is done, the job is over.
    here.slurm_says("PENDING", "CANCELLED")
    here.fields["name"] = "other"
    said = here.submit("local")
    assert "1 done" in said.out
    assert "left to" not in said.out


def test_slurms_last_answer_about_leases_counts_while_it_is_silent_and_without_one_nothing_is_trained(
    here: Here, tmp_path: Path
) -> None:
    here.fields["grid"]["iterations"] = [5]
    here.submit()
    resolved, made = planned(str(here.study), here.root.path, None, None)
    backend = open_backend("local", tmp_path, SubmitTarget("local"))
    begun, late = (Submission(resolved, made, backend) for _ in range(2))
    tasks = begun.prepare([run.status for run in made.runs])
    here.slurm_says("COMPLETED")
    assert begun.leave_leased(tasks, Leases(here.root)) == tasks
    here.slurm_is_silent()
    assert begun.leave_leased(tasks, Leases(here.root)) == tasks
    arrays = here.root.study("tiny") / "arrays"
    with pytest.raises(
        SchedulerUnavailable, match=rf"no controller; a job of study tiny .* or remove {arrays} if"
    ):
        late.leave_leased(tasks, Leases(here.root))


def test_other_resources_of_a_submitted_study_are_taken_by_the_way_that_submit_names(
    here: Here,
) -> None:
    here.submit()
    here.slurm_says("PENDING")
    assert "other resources" not in here.submit().err
    here.fields["resources"] = {"ranks": 2, "micro_batch": 4}
    for _ in range(2):  # the registered study has them after the first
        said = here.submit().err
        assert "2 runs with jobs of other resources, which they keep (" in said
        assert "micro_batch 8, now 4; ranks 1, now 2" in said
        assert (
            f"`ssmscale cancel tiny --root {here.root.path}`, then `ssmscale retry {here.study} --root"
            in said
        )
    assert here.ask("cancel").status == 0
    here.slurm_says("CANCELLED")
    assert "2 runs in 1 series submitted" in here.ask("retry").out
    newest = list(ArrayStore(here.root.study("tiny")).read().values())[-1]
    assert [task.ranks for task in newest.tasks] == [2]
    assert read_launch(here.root, newest.tasks[0].series_id).micro_batch == 4
    here.slurm_says("PENDING")
    assert "other resources" not in here.submit().err


def test_a_study_whose_nodes_all_failed_is_refused_until_one_is_forgotten(
    here: Here, ssmscale: Command
) -> None:
    for node in ("n9", "low"):  # sinfo here says `low` to every question
        here.root.control("tiny").append("bad_node", node=node, reason="Xid 79", runs=[])
    cluster = ("--on", "slurm", "--cluster", str(here.root.path.parent / "dev.yaml"))
    said = here.ask("submit", *cluster)
    assert said.status == 2
    assert "every node of low has failed under this study: n9 (" in said.err
    forget = ("doctor", "--root", str(here.root.path), "--forget-node")
    assert "no study under" in ssmscale(*forget, "n1").err
    assert ssmscale(*forget, "low").status == 0
    assert here.ask("submit", *cluster).status == 0
    (script,) = (here.root.study("tiny") / "logs" / "slurm").glob("*/77_submission.sh")
    assert "#SBATCH --exclude=n9" in script.read_text().splitlines()


def test_a_retry_with_a_yaml_of_other_runs_trains_the_study_as_submitted(here: Here) -> None:
    here.submit()
    here.ask("cancel")
    here.slurm_says("CANCELLED")
    here.fields["resources"] = {"ranks": 2}
    here.fields["grid"]["seeds"] = [3, 4, 5]
    assert "2 runs in 1 series submitted" in here.ask("retry").out
    newest = list(ArrayStore(here.root.study("tiny")).read().values())[-1]
    assert [task.ranks for task in newest.tasks] == [1]


def test_a_retry_waits_for_a_job_that_still_saves_and_forgets_nothing_if_it_does_not_end(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cancel, "LOOK_SECONDS", 0.01)
    here.submit()
    here.ask("cancel")
    control = here.root.study("tiny") / "control.jsonl"
    before = control.read_bytes()
    here.slurm_says("COMPLETING")
    with monkeypatch.context() as impatient:
        impatient.setattr(cancel, "SAVING_SECONDS", 0.0)
        said = here.ask("retry")
    assert said.status == 1
    assert "SLURM job 77_0 is still saving" in said.err
    assert control.read_bytes() == before
    here.slurm_says(*["COMPLETING"] * 4, "CANCELLED")
    said = here.ask("retry")
    assert said.status == 0, said.err
    assert "2 runs to be tried again" in said.out
    assert "2 runs in 1 series submitted" in said.out
