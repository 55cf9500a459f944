"""Tuning on a real SLURM: trials are jobs that outlive the process that controls the search."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from harness.record.journal import Event, attempts, read_progress
from tests.cluster.slurm_study import Make, SlurmStudy
from tests.programs import write_program
from tests.studies import Fields
from tests.waiting import PATIENCE, wait_until

pytestmark = pytest.mark.cluster


def start_tune(study: SlurmStudy, *options: str, **environment: str) -> subprocess.Popen[str]:
    return study.start("tune", "--json", *study.target(), *options, **environment)


def refusing_once(folder: Path, path: str) -> str:
    """Return a PATH on which sbatch fails once, as it does while slurmctld is started again."""
    mark, real = folder / "refuse", shutil.which("sbatch", path=path)
    mark.touch()
    refuse = "echo 'sbatch: error: Unable to contact slurm controller' >&2 && exit 1"
    script = write_program(folder / "bin" / "sbatch", f'rm {mark} 2>/dev/null && {refuse}\nexec {real} "$@"')
    return f"{script.parent}:{path}"


def test_a_search_whose_controller_was_killed_finds_its_jobs_again_and_waits_for_slurm(
    make: Make, study_fields: Fields, tmp_path: Path
) -> None:
    study_fields["grid"]["iterations"] = [30]
    study_fields["tune"] = {
        "sizes": ["xs"],
        "trials": 3,
        "parallel": 2,
        "search": {"optimiser.lr": {"low": 1e-3, "high": 1e-1, "log": True}},
    }
    study = make(study_fields)
    runs = study.root.path / "runs"
    first = start_tune(study, "--set", "tune.trials=2")  # leaves one to be submitted by the next
    try:
        wait_until(lambda: any(read_progress(run).state == Event.FINISHED for run in runs.glob("*")))
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    path = refusing_once(tmp_path, study.environment["PATH"])
    out, err = start_tune(study, PATH=path).communicate(timeout=PATIENCE)
    (cell,) = json.loads(out)["cells"]
    assert cell["trials"] == {"finished": 3}, err
    assert (
        "warning: sbatch: error: Unable to contact slurm controller; the submission is repeated until it succeeds"
        in err
    )
    assert [attempts(run) for run in runs.glob("*")] == [[1]] * 3  # no trial was begun twice
    arrays = [json.loads(path.read_text()) for path in study.root.study("tiny/tune").glob("arrays/*.json")]
    assert sorted(array["is_void"] for array in arrays) == [False] * 3 + [True]


def test_a_search_that_is_stopped_names_the_verbs_that_reach_the_trials_which_go_on(
    make: Make, study_fields: Fields
) -> None:
    study_fields["grid"]["iterations"] = [3000]
    study_fields["tune"] = {
        "sizes": ["xs"],
        "trials": 2,
        "search": {"optimiser.lr": {"low": 1e-3, "high": 1e-1, "log": True}},
    }
    study = make(study_fields)
    study.step_seconds = 0.02
    search = start_tune(study)
    wait_until(lambda: any(read_progress(folder).step > 5 for folder in study.root.path.glob("series/*")))
    search.send_signal(signal.SIGINT)
    _, err = search.communicate(timeout=PATIENCE)
    place = ["--root", str(study.root.path)]
    said = [
        ["ssmscale", *words] for words in (["status", "tiny/tune", *place], ["cancel", "tiny/tune", *place])
    ]
    assert all(f"`{' '.join(words)}`" in err for words in said), err
    assert "workers save" not in err
    shown = json.loads(study.call_words(*said[0][1:], "--json").out)
    assert set(shown["counts"]) <= {"running", "queued"}
    running = next(row["run_id"] for row in shown["runs"] if row["state"] == "running")
    assert "SLURM's log of job" in study.call_words("logs", "tiny/tune", running, *place).out
    assert "cancelled" in study.call_words(*said[1][1:]).out
    study.wait_until_over()
    shown = json.loads(study.call_words(*said[0][1:], "--json").out)
    assert set(shown["counts"]) == {"cancelled"}
    assert "`ssmscale tune` alone" in study.call_words("retry", "tiny/tune", *place).err
