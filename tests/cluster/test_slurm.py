"""On a real SLURM: a study is handed over once and whole, however it is submitted, and no other study with it."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.slurm_study import Make, held_back
from tests.harness.trainer import losses, undisturbed
from tests.studies import Fields, with_iterations
from tests.waiting import PATIENCE, wait_until

pytestmark = pytest.mark.cluster


def test_a_study_is_submitted_and_finishes_by_itself_in_a_root_with_spaces_and_quotes_in_its_name(
    make: Make, study_fields: Fields, tmp_path: Path
) -> None:
    study = make(name='it\'s a "study" $(touch hacked)')
    assert "2 runs in 1 series submitted to dev" in study.submit()
    states = study.status()["counts"]
    assert set(states) <= {"queued", "running", "done"}
    assert sum(states.values()) == 2
    study.wait_until_over()
    assert losses(study.root, study_fields) == undisturbed(study_fields)
    assert "nothing of tiny is left to submit" in study.submit()
    assert not list(tmp_path.rglob("hacked"))


def test_two_submissions_at_once_submit_every_series_once(make: Make, study_fields: Fields) -> None:
    study_fields["grid"]["seeds"] = list(range(6))
    study = make(study_fields)
    with held_back(study.slurm):
        both = [study.start("submit", *study.target()) for _ in range(2)]
        for process in both:
            _, said = process.communicate(timeout=PATIENCE)
            assert process.returncode == 0, said
        assert len(study.queue()) == 6


def test_a_second_study_joins_the_job_that_trains_its_trunk_which_comes_back_for_it_and_trains_all_it_lacks(
    make: Make, study_fields: Fields
) -> None:
    first = make({**with_iterations(study_fields, 60, 2000), "name": "first"})
    second = make({**with_iterations(study_fields, 20, 60, 90), "name": "second"}, name="second")
    cancelled = make({**with_iterations(study_fields, 3000), "name": "cancelled"}, name="cancelled")
    second.root = cancelled.root = first.root
    first.step_seconds = 0.1
    first.submit()
    first.wait_for_step(20)  # the branch of 20 lies behind the trunk
    (series,) = first.series()
    job = first.job(series)
    joined = f"3 runs join job {job} of study first, which trains their trunk"
    assert joined in second.submit()
    assert "1 run joins" in cancelled.submit()
    assert "nothing of second is left to submit" in second.submit()
    told = second.status()
    assert told["counts"].keys() <= {"running", "queued"}
    assert {run["job_id"] for run in told["runs"]} == {job}
    assert all(f"job {job} of study first trains its trunk" in run["reason"] for run in told["runs"])
    short = min(told["runs"], key=lambda run: run["iterations"])
    assert short["train_loss"] is None  # the trunk's newest is that of longer runs
    assert "SLURM's log of job" in second.run("logs", short["run_id"])

    said = first.run("cancel")
    assert f"job {job} goes on: runs of other studies have joined it" in said
    first.slurm("scancel", "--signal=USR2", job)  # as near its time limit: it is requeued
    wait_until(lambda: any("REQUEUE" in line or "PENDING" in line for line in first.queue()))
    first.slurm("scontrol", "release", job)
    assert "3 done" in second.run("status", "--watch")
    assert cancelled.run("cancel").endswith("1 run cancelled\n")
    first.wait_until_over()
    alone = undisturbed(with_iterations(study_fields, 20, 60, 90))
    assert losses(second.root, second.fields) == alone
    assert "of them for other studies too" in second.run("status")
    assert first.status()["counts"] == {"done": 1, "cancelled": 1}
    assert cancelled.status()["counts"] == {"cancelled": 1}


def test_a_submission_killed_half_way_is_completed_by_the_next(make: Make, study_fields: Fields) -> None:
    study_fields["grid"]["seeds"] = list(range(120))
    study = make(study_fields, limits={"hours": 1, "array_size": 20})
    with held_back(study.slurm):
        process = study.start("submit", *study.target())
        wait_until(lambda: len(list(study.root.path.glob("studies/*/arrays/*.json"))) >= 2)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        study.submit()
        assert len(study.queue()) == 120
        names = set(study.slurm("squeue", "--noheader", "--format=%j").split())
        assert len(names) <= 7


def test_arrays_are_split_at_the_sites_limit_and_cancelling_leaves_other_jobs_alone(
    make: Make, study_fields: Fields
) -> None:
    study_fields["grid"]["seeds"] = list(range(70))
    study = make(study_fields, limits={"hours": 1, "array_size": 50})
    with held_back(study.slurm):
        other = study.slurm("sbatch", "--parsable", "--output=/dev/null", "--wrap", "true").strip()
        study.submit()
        ids = [job.split("_") for job in map(first_word, study.queue()) if job != other]
        assert len({number for number, _ in ids}) == 2
        assert max(int(index) for _, index in ids) == 49
        assert len(ids) == 70
        assert "70 jobs taken from SLURM" in study.run("cancel")
        assert study.status()["counts"] == {"cancelled": 140}
        assert [first_word(line) for line in study.queue()] == [other]


def first_word(line: str) -> str:
    return line.partition(" ")[0]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("partitions", {"nosuch": None}, ["partitions", "nosuch", "high, low"]),
        ("partitions", {"lo w": None}, ["partitions", "lo w"]),
        ("account", "$(touch hacked)", ["account", "$(touch hacked)"]),
        ("constraint", "a;b", ["constraint", "a;b"]),
        ("setup", ["true\ntouch hacked"], ["setup"]),
        ("gpu", 8, ["gpu", "gpus"]),
    ],
)
def test_a_wrong_profile_is_refused_in_one_sentence_and_nothing_is_submitted(
    make: Make, tmp_path: Path, key: str, value: Any, said: list[str]
) -> None:
    study = make(**{key: value})
    out = study.submit(status=2)
    assert "Traceback" not in out
    for word in said:
        assert word in out
    assert study.queue() == []
    assert not study.root.path.exists()
    assert not list(tmp_path.rglob("hacked"))
