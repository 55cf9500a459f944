"""Resuming stays on the interrupted layout if it can, and otherwise reports the difference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from harness.record.journal import read_progress
from harness.record.root import Root
from harness.record.status import StatusReader, to_rounding
from harness.train import engine
from harness.train.stopping import StopFlag
from harness.train.worker import train_series
from tests.harness.journals import read_events, registered
from tests.harness.trainer import StopAfter, losses, prepared, series_folder, train, undisturbed
from tests.studies import Fields


@pytest.fixture
def interrupted(here: Root, study_fields: Fields) -> Root:
    study_fields["grid"]["iterations"] = [5]
    assert train(here, study_fields, StopAfter(3), micro_batch=2) == ["preempted"]
    return here


def layout(root: Root) -> dict[str, Any]:
    started = read_progress(series_folder(root)).started
    assert started is not None
    return dict(started["layout"])


def warnings(root: Root) -> list[str]:
    return [event["text"] for event in read_events(series_folder(root)) if event["event"] == "warning"]


def test_the_micro_batch_of_the_attempt_before_stays_though_more_is_allowed(
    interrupted: Root, study_fields: Fields
) -> None:
    train(interrupted, study_fields, micro_batch=8)
    assert (layout(interrupted)["micro_batch"], layout(interrupted)["kernels"]) == (2, "torch")
    assert warnings(interrupted) == []
    assert losses(interrupted, study_fields) == undisturbed(study_fields, micro_batch=2)


@pytest.mark.parametrize(
    ("changed", "warning"),
    [
        ({"micro_batch": 1}, "micro_batch is 1 and was 2 in the attempt before"),
        ({"micro_batch": 2, "threads": 2}, "threads is 2 and was 1 in the attempt before"),
    ],
)
def test_a_difference_that_moves_losses_is_reported(
    interrupted: Root, study_fields: Fields, changed: dict[str, int], warning: str
) -> None:
    before = torch.get_num_threads()
    try:
        train(interrupted, study_fields, **changed)
    finally:
        torch.set_num_threads(before)
    (reported,) = warnings(interrupted)
    assert reported.startswith(warning)
    resolved = registered(interrupted, study_fields)
    rows = StatusReader(interrupted, resolved.study.name).read(resolved.points)
    said = warning.removesuffix(" in the attempt before")
    assert rows[0].layout_changes == (said,)
    assert to_rounding(rows) == (
        "1 of the study's 1 runs went on with another layout, so their losses agree with an undisturbed training to "
        f"rounding, not to the bit: {said}."
    )


def test_a_worker_refuses_to_train_on_another_number_of_ranks_than_was_asked_for(
    here: Root, study_fields: Fields
) -> None:
    ((place, runs), *_) = prepared(here, study_fields)
    assert train_series(runs, place, StopFlag(), 2) == "failed"
    (told,) = read_events(series_folder(here))
    assert told["event"] == "failed"
    assert "started as rank 0 of 1, and the study's plan has 2: the launcher hides" in told["reason"]


def test_the_journal_holds_samples_of_the_resources_that_the_first_rank_uses(interrupted: Root) -> None:
    systems = read_progress(series_folder(interrupted)).systems
    assert min(systems) == 1
    assert systems[1]["cpu_percent"] >= 0
    assert 0.05 < systems[1]["memory_gib"] < 50
    assert "gpu_percent" not in systems[1]


def test_a_sample_is_taken_at_most_every_ten_seconds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    now = [0.0]
    monkeypatch.setattr(engine.time, "monotonic", lambda: now[0])
    sampler = engine.Usage("cpu", Root(tmp_path))
    taken = []
    for now[0] in (0.0, 9.9, 10.1):
        taken.append(sampler.sample() is not None)
    assert taken == [True, False, True]
