"""Deaths in an allocation that trains a packed study, one after the other: of a rank, a raylet, the controller."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest

from harness.record.control import Control
from harness.record.journal import Event, read_progress
from tests.cluster.slurm_study import Make
from tests.harness.journals import read_events
from tests.harness.trainer import losses, undisturbed
from tests.waiting import wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.verify]

Fields = dict[str, Any]


def raylet_over(process: psutil.Process) -> psutil.Process:
    """Return the raylet of a rank's node."""
    (raylet,) = [parent for parent in process.parents() if parent.name() == "raylet"]
    return raylet


def times(event: Event, folder: Path) -> int:
    return [found["event"] for found in read_events(folder)].count(event)


def test_finished_runs_stay_and_the_rest_finishes_once_whatever_is_killed(
    make: Make, study_fields: Fields, tmp_path: Path
) -> None:
    study_fields["grid"] |= {"iterations": [10, 900], "seeds": [0, 1, 2, 3, 4]}
    study_fields["resources"] = {"checkpoint_every": 50}
    study_fields["tracking"] = {"log_every": 5}
    study = make(study_fields)  # of two nodes with two GPUs each
    study.submit("--nodes", "2", on="ray")
    hit: list[Path] = []

    def rank_of_another() -> psutil.Process:
        """Return the first rank of a Series that has a checkpoint and was not hit before."""

        def in_reach() -> list[Path]:
            past = [series for series in study.series() if 60 <= read_progress(series).step < 400]
            return [series for series in past if series not in hit and read_progress(series).is_alive]

        wait_until(lambda: bool(in_reach()), at_once=True)
        hit.append(in_reach()[0])
        started = read_progress(hit[-1]).started
        assert started is not None
        return psutil.Process(started["pid"])

    rank_of_another().kill()
    raylet_over(rank_of_another()).kill()
    rank_of_another()
    runs = list((study.root.path / "runs").iterdir())
    finished = [run for run in runs if read_progress(run).state == Event.FINISHED]
    (controller,) = study.controllers()
    controller.kill()
    wait_until(lambda: bool(set(study.controllers()) - {controller}))
    study.wait_until_over()

    assert len(study.arrays()) == 1
    assert losses(study.root, study_fields) == pytest.approx(undisturbed(study_fields), abs=1e-6)
    assert {times(Event.FINISHED, run) for run in runs} == {1}
    assert {times(Event.STARTED, run) for run in finished} <= {1}
    assert times(Event.RESUMED, hit[0]) >= 1
    events = Control(study.root.study("tiny") / "control.jsonl").read()
    (crash,) = [event for event in events if event["event"] == "crashed"]
    assert crash["reason"].startswith("its controller ended with status -9")
