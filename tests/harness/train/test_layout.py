"""Resuming stays on the layout that was interrupted where it can, and says so where it cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness.record.journal import read_progress
from harness.record.root import Root
from harness.train import engine
from tests.harness.journals import read_events
from tests.harness.trainer import StopAfter, losses, series_folder, train

Fields = dict[str, Any]


@pytest.fixture
def interrupted(tmp_path: Path, study_fields: Fields) -> Root:
    root = Root(tmp_path / "runs")
    study_fields["grid"]["iterations"] = [10]
    assert train(root, study_fields, StopAfter(3), micro_batch=2) == ["preempted"]
    return root


def layout(root: Root) -> dict[str, Any]:
    started = read_progress(series_folder(root)).started
    assert started is not None
    return dict(started["layout"])


def warnings(root: Root) -> list[str]:
    return [event["text"] for event in read_events(series_folder(root)) if event["event"] == "warning"]


def test_the_micro_batch_of_the_attempt_before_stays_though_more_is_allowed(
    interrupted: Root, study_fields: Fields, tmp_path: Path
) -> None:
    train(interrupted, study_fields, micro_batch=8)
    assert layout(interrupted)["micro_batch"] == 2
    assert warnings(interrupted) == []
    apart = Root(tmp_path / "apart")
    train(apart, study_fields, micro_batch=2)
    assert losses(interrupted, study_fields) == losses(apart, study_fields)


def test_a_smaller_micro_batch_is_heeded_and_reported(interrupted: Root, study_fields: Fields) -> None:
    train(interrupted, study_fields, micro_batch=1)
    (told,) = warnings(interrupted)
    assert told.startswith("micro_batch is 1 and was 2 in the attempt before")


def test_other_threads_are_reported(interrupted: Root, study_fields: Fields) -> None:
    import torch

    before = torch.get_num_threads()
    try:
        train(interrupted, study_fields, micro_batch=2, threads=2)
    finally:
        torch.set_num_threads(before)
    (told,) = warnings(interrupted)
    assert told.startswith("threads is 2 and was 1 in the attempt before")


def test_the_layout_names_the_kernels(interrupted: Root) -> None:
    assert layout(interrupted)["kernels"] == "torch"


def test_what_the_first_rank_uses_is_journalled_now_and_then(interrupted: Root) -> None:
    systems = read_progress(series_folder(interrupted)).systems
    assert min(systems) == 1
    assert systems[1]["cpu_percent"] >= 0
    assert 0.05 < systems[1]["memory_gib"] < 50
    assert "gpu_percent" not in systems[1]


def test_a_sample_is_taken_at_most_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(engine.time, "monotonic", lambda: now[0])
    sampler = engine.Usage("cpu")
    assert sampler.sample() is not None
    now[0] = 9.9
    assert sampler.sample() is None
    now[0] = 10.1
    assert sampler.sample() is not None
