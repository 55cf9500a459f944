"""On a real SLURM: ranks on two nodes train one Series, and another number of them goes on from what they saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from harness.record.journal import Event
from tests.cluster.slurm_study import Make
from tests.harness.journals import read_events
from tests.harness.trainer import losses, undisturbed

pytestmark = pytest.mark.cluster

Fields = dict[str, Any]


def test_what_four_ranks_on_two_nodes_saved_two_ranks_go_on_with(
    make: Make, study_fields: Fields, tmp_path: Path
) -> None:
    study_fields["grid"]["iterations"] = [10, 40]  # they leave the trunk at steps 8 and 32
    study_fields["resources"] = {"ranks": 4, "zero_stage": 3}
    study = make(study_fields)
    study.submit()
    study.wait_until_over()
    assert losses(study.root, study_fields) == pytest.approx(undisturbed(tmp_path, study_fields), abs=1e-4)

    study_fields["grid"]["iterations"] = [10, 36, 40]  # the new one at step 29, from what was saved at step 8
    study_fields["resources"]["ranks"] = 2
    fewer = make(study_fields)
    assert "1 run in 1 series submitted" in fewer.submit()
    fewer.wait_until_over()
    assert len(losses(study.root, study_fields)) == 3
    (series,) = study.tasks()
    four, two = (trunk(series, attempt) for attempt in (1, 2))
    assert [four.layout, two.layout] == [(4, 3), (2, 3)]
    assert sorted(two.losses) == list(range(9, 30))
    assert list(two.losses.values()) == pytest.approx([four.losses[step] for step in two.losses], abs=1e-5)


@dataclass(frozen=True)
class Trunk:
    """What one attempt told of a trunk."""

    layout: tuple[int, int]
    """Ranks and ZeRO stage."""
    losses: Mapping[int, float]
    """By step."""


def trunk(series: Path, attempt: int) -> Trunk:
    first, *events = [event for event in read_events(series) if event["attempt"] == attempt]
    steps = {event["step"]: event["loss"] for event in events if event["event"] == Event.STEP}
    return Trunk((first["layout"]["ranks"], first["layout"]["zero_stage"]), steps)
