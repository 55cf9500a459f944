"""Activation checkpointing takes less memory and changes no bit of a loss."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.record.journal import read_progress
from harness.record.root import Root
from tests.harness.conftest import PlanOf
from tests.harness.trainer import losses, series_folder, train
from tests.studies import Fields


@pytest.mark.parametrize(
    "stage", [0, *(pytest.param(stage, marks=pytest.mark.verify) for stage in (1, 2, 3))]
)
def test_losses_are_the_same_to_the_bit(tmp_path: Path, study_fields: Fields, stage: int) -> None:
    study_fields["grid"]["iterations"] = [5]
    study_fields["model"]["dropout"] = 0.3
    if stage == 3:  # which partitions tensors of more than 100,000 weights
        study_fields["grid"]["sizes"] = {"wide": {"n_blocks": 2, "d_model": 256}}
    seen = []
    for checkpointed in (False, True):
        root = Root(tmp_path / str(checkpointed))
        settings = {"zero_stage": stage, "micro_batch": 2, "log_every": 1}
        train(root, study_fields, activation_checkpointing=checkpointed, **settings)
        progress = read_progress(series_folder(root))
        assert progress.started is not None
        assert progress.started["layout"]["activation_checkpointing"] is checkpointed
        steps = [event["loss"] for event in progress.steps.values()]
        seen.append((steps, losses(root, study_fields)))
    assert len(seen[0][0]) >= 4
    assert seen[0] == seen[1]


def test_a_size_with_it_takes_less_memory_and_stays_the_same_run(
    study_fields: Fields, plan_of: PlanOf
) -> None:
    study_fields["grid"]["sizes"] = {
        "xs": {"n_blocks": 1, "d_model": 16},
        "s": {"n_blocks": 8, "d_model": 16},
    }
    study_fields["resources"] = {"micro_batch": 2}
    before = plan_of(study_fields)["runs"]
    study_fields["grid"]["sizes"]["s"]["resources"] = {"activation_checkpointing": True}
    after = plan_of(study_fields)["runs"]
    assert [run["run_id"] for run in after] == [run["run_id"] for run in before]
    shrunk = [now["memory_gib"] < then["memory_gib"] for now, then in zip(after, before, strict=True)]
    assert shrunk == [run["n_params"] == max(r["n_params"] for r in after) for run in after]
