"""On a real SLURM: a fault is reported where the user looks, and costs nothing that was saved."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.record.journal import Event, read_progress
from tests.cluster.slurm_study import Make, SlurmStudy, wake
from tests.harness.trainer import losses, undisturbed
from tests.studies import Fields
from tests.waiting import wait_until

pytestmark = pytest.mark.cluster


def reasons(status: Any) -> set[str]:
    return {str(row["reason"]) for row in status["runs"]}


def test_a_job_that_ends_three_times_at_the_same_place_stays_failed_until_it_is_retried(
    make: Make, study_fields: Fields, tmp_path: Path
) -> None:
    broken = tmp_path / "module" / "torch"  # as a wrong `module load` puts before the right one
    broken.mkdir(parents=True)
    missing = "libcudart.so.12: cannot open shared object file"
    (broken / "__init__.py").write_text(f"raise ImportError({missing!r})\n")
    study = make(study_fields, setup=[f'export PYTHONPATH="{broken.parent}:$PYTHONPATH"'])
    study.submit()
    study.wait_until_over()
    status = study.status()
    assert status["counts"] == {"failed": 2}
    (reason,) = reasons(status)
    assert f"ended 3 times at the same place; its log ends: ImportError: {missing}" in reason
    run_id = status["runs"][0]["run_id"]
    assert study.run("logs", run_id).count(f"ImportError: {missing}") == 3
    assert "nothing of tiny is left to submit" in study.submit()  # `retry` alone tries it again

    study.profile_path.write_text(yaml.safe_dump({**study.profile, "setup": []}), encoding="utf-8")
    assert "2 runs to be tried again" in study.run("retry", "--cluster", str(study.profile_path))
    study.wait_until_over()
    assert study.status()["counts"] == {"done": 2}


def test_a_job_that_its_user_cancels_in_slurm_saves_and_stays_out_of_the_queue(
    make: Make, study_fields: Fields
) -> None:
    study_fields["grid"]["iterations"] = [10, 200]
    study = make(study_fields)
    study.step_seconds = 0.02
    study.submit()
    (series,) = study.tasks()
    study.hold({series: 30})
    study.slurm("scancel", study.job(series))
    study.wait_until_over()
    assert study.status()["counts"] == {"done": 1, "interrupted": 1}
    told = read_progress(series)
    assert (told.attempt, told.stopped_by) == (1, "SIGTERM")


@contextmanager
def full(study: SlurmStudy) -> Iterator[None]:
    """Fill the disk of ROOT during the block."""
    filling = study.root.path / "filling"
    try:
        with filling.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(2**16))
        yield
    finally:
        filling.unlink()


@contextmanager
def read_only(study: SlurmStudy) -> Iterator[None]:
    """Make the directories of the Series read-only during the block, for root too."""
    with ExitStack() as undo:
        for folder in map(str, study.series()):
            subprocess.run(["mount", "--bind", folder, folder], check=True)
            undo.callback(subprocess.run, ["umount", "--lazy", folder], check=True)
            subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
        yield


@pytest.mark.parametrize(
    ("trouble", "said", "remedy"),
    [
        pytest.param(full, "its disk is full", "free some space", marks=pytest.mark.verify),
        (read_only, "its file system is read-only", "make it writable"),
    ],
    ids=["full", "read-only"],
)
def test_a_disk_that_takes_no_more_interrupts_and_the_same_command_goes_on(
    make: Make,
    study_fields: Fields,
    small_disk: Callable[[int], Path],
    tmp_path: Path,
    trouble: Callable[[SlurmStudy], Any],
    said: str,
    remedy: str,
) -> None:
    study_fields["grid"]["iterations"] = [10, 200]
    study_fields["resources"] = {"checkpoint_every": 20}
    small_disk(16 * 2**20)  # mounted at tmp_path / "disk-0"
    study = make(study_fields, name="disk-0")
    study.step_seconds = 0.02
    study.submit()
    (series,) = study.tasks()
    held = study.hold({series: 30})[series]
    with trouble(study):
        wake(*held)
        study.wait_until_over()
        status = study.status()
        assert status["counts"] == {"done": 1, "interrupted": 1}
        (why,) = reasons(status) - {"None"}
        assert said in why
        sentence = study.submit(status=1)
        assert said in sentence
        assert f"{remedy}, then the same command goes on from here" in " ".join(sentence.split())
    kept = read_progress(series)
    study.submit()
    study.wait_until_over()
    assert min(step for step in read_progress(series).steps if step > 20) == 21
    assert read_progress(series).attempt == kept.attempt + 1
    assert losses(study.root, study_fields) == undisturbed(study_fields, checkpoint_every=20)


def test_a_rank_that_is_stopped_and_a_job_that_never_begins_are_requeued_and_lose_nothing_that_was_saved(
    make: Make, study_fields: Fields, tmp_path: Path
) -> None:
    study_fields["grid"]["iterations"] = [200]
    study_fields["resources"] = {"ranks": 2, "checkpoint_every": 10, "stall_seconds": 5}
    study = make(study_fields, setup=[f"export PACED_FIFO={tmp_path}/fifo"])
    study.step_seconds = 0.05
    os.mkfifo(tmp_path / "fifo")
    study.submit()
    (series,) = study.tasks()
    job = study.job(series)
    wait_until(lambda: any("in its start" in event["reason"] for event in study.events(Event.PREEMPTED)))
    (tmp_path / "fifo").unlink()
    first, *_ = study.hold({series: 30})[series]
    saved = max(event["step"] for event in study.events(Event.CHECKPOINT))
    wake(first)
    study.wait_until_over()
    assert study.job(series) == job
    stalls = [event["reason"] for event in study.events(Event.PREEMPTED) if event["kind"] == "stalled"]
    assert any("in step" in reason for reason in stalls), stalls
    newest = read_progress(series)
    assert min(step for step, event in newest.steps.items() if event["attempt"] == newest.attempt) > saved
    assert any("most recent call first" in log.read_text() for log in series.glob("logs/rank-*.log"))
    assert f"requeueing job {job}" in study.run("logs", study.tasks()[series].run_dirs[0].name)
    assert losses(study.root, study_fields) == pytest.approx(undisturbed(study_fields), abs=1e-4)


@pytest.mark.verify
def test_a_job_that_reaches_its_time_limit_saves_and_is_requeued_under_its_own_number(
    make: Make, study_fields: Fields, tmp_path: Path
) -> None:
    study_fields["grid"]["iterations"] = [10, 200]
    study = make(study_fields, limits={"hours": 1 / 60}, signal_seconds=20)
    study.step_seconds = 0.02
    study.submit()
    (series,) = study.tasks()
    job = study.job(series)
    study.hold({series: 30})  # SLURM wakes the processes that it signals
    wait_until(lambda: study.count(Event.PREEMPTED, reason="SIGUSR2") == 1)
    study.wait_until_over()
    assert read_progress(series).attempt == 2
    assert study.job(series) == job
    assert f"requeueing job {job}" in study.run("logs", study.tasks()[series].run_dirs[0].name)
    assert losses(study.root, study_fields) == undisturbed(study_fields)
