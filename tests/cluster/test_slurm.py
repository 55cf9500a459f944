"""On a real SLURM: a study is handed over once and whole, however it is submitted, and no other study with it."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.slurm_study import Make, held_back
from tests.harness.trainer import losses, undisturbed
from tests.studies import Fields
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
