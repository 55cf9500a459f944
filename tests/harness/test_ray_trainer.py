"""A long Series in a Ray Train trainer: which get one, and how their ranks are asked to stop."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.dispatch.base import Job
from harness.dispatch.ray_trainer import START_SECONDS, is_long
from harness.training.preemption import StopFile


def test_only_a_series_that_trains_much_longer_than_a_trainer_takes_to_start_gets_one(tmp_path: Path) -> None:
    def job(seconds: float, gpu_fraction: float = 1.0) -> Job:
        return Job("s", (), 1, 1, 1, tmp_path, seconds=seconds, gpu_fraction=gpu_fraction)

    assert is_long(job(21 * START_SECONDS))
    assert not is_long(job(19 * START_SECONDS))
    assert not is_long(job(21 * START_SECONDS, gpu_fraction=0.5))


def test_a_stop_file_is_heeded_when_a_word_is_written_into_it_and_not_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("harness.training.preemption.time.monotonic", lambda: now[0])
    flag = StopFile(tmp_path / "stop")
    assert flag.reason is None  # the file system is away
    (tmp_path / "stop").write_text("")
    now[0] += 2
    assert flag.reason is None
    (tmp_path / "stop").write_text("SIGTERM")
    assert flag.reason is None  # looked a moment ago
    now[0] += 2
    assert flag.reason == "SIGTERM"
    (tmp_path / "stop").unlink()
    now[0] += 2
    assert flag.reason == "SIGTERM"
