"""On a real SLURM: ranks on two nodes train one Series, and another number of them goes on from their checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from harness.record.journal import Event
from tests.cluster.slurm_study import Make
from tests.harness.journals import read_events
from tests.harness.trainer import losses, undisturbed
from tests.studies import Fields

pytestmark = pytest.mark.cluster


OF_A_SESSION = {
    "SLURM_MEM_PER_CPU": "500",
    "SLURM_EXPORT_ENV": "NONE",
    "SLURM_CPU_BIND": "map_cpu:99",
    "SRUN_CPUS_PER_TASK": "3",
    "SLURM_NTASKS": "1",
    "SBATCH_PARTITION": "nowhere",
    "RANK": "0",
    "WORLD_SIZE": "1",
}
"""Variables of the shell that submits, as of a salloc or a torchrun, each of which ends or misleads an srun."""


def test_two_ranks_go_on_from_what_four_ranks_on_two_nodes_saved_whatever_the_shell_holds(
    make: Make, study_fields: Fields, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in OF_A_SESSION.items():
        monkeypatch.setenv(name, value)
    study_fields["grid"]["iterations"] = [10, 20]  # they leave the trunk at steps 8 and 16
    study_fields["resources"] = {"ranks": 4, "zero_stage": 3}
    study = make(study_fields)
    study.submit()
    study.wait_until_over()
    assert losses(study.root, study_fields) == pytest.approx(undisturbed(study_fields), abs=1e-4)

    study_fields["grid"]["iterations"] = [10, 15, 20]  # the new one at step 12, from what was saved at step 8
    study_fields["resources"]["ranks"] = 2
    fewer = make(study_fields)
    assert "1 run in 1 series submitted" in fewer.submit()
    fewer.wait_until_over()
    assert len(losses(study.root, study_fields)) == 3
    (series,) = study.tasks()
    assert [layout(series, attempt) for attempt in (1, 2)] == [(4, 3), (2, 3)]
    four, two = (losses_by_step(series, attempt) for attempt in (1, 2))
    assert sorted(two) == list(range(9, 13))
    assert list(two.values()) == pytest.approx([four[step] for step in two], abs=1e-5)


def layout(series: Path, attempt: int) -> tuple[int, int]:
    """Return the ranks and the ZeRO stage of an attempt."""
    first = next(event for event in read_events(series) if event["attempt"] == attempt)
    return first["layout"]["ranks"], first["layout"]["zero_stage"]


def losses_by_step(series: Path, attempt: int) -> Mapping[int, float]:
    steps = [event for event in read_events(series) if event["event"] == Event.STEP]
    return {event["step"]: event["loss"] for event in steps if event["attempt"] == attempt}
