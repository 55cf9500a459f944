"""24 Series of one, two and four GPUs in one allocation of two nodes: GPUs idle only while ranks start.

Steps come at a given pace (`paced`), slow enough for eight ranks on two cores, so that the test measures the packing. A
Series counts from its first step to its last in its journal. The time between two Series on a GPU is loss, with the
imports and starts of ranks. The start of Ray is printed apart.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from harness.record.journal import Event
from harness.record.root import Root, read_run
from tests.cluster.slurm_study import SlurmStudy
from tests.harness.journals import read_events
from tests.waiting import wait_until

STEP_SECONDS = 1.0
LENGTHS = {"prefix_mamba": 30, "prefix_simba": 50, "cross_simba": 80, "cross_transformer": 120}
"""Steps by architecture: half a minute to two, of which a start takes a larger share than of a real Series."""
RANKS = {"one": 1, "two": 2, "four": 4}
GPUS = 8


@dataclass(frozen=True)
class Trained:
    """Time in which a Series trained, by its journal, in seconds since the epoch."""

    ranks: int
    first: float
    last: float

    @property
    def seconds(self) -> float:
        return self.last - self.first


@dataclass(frozen=True)
class Makespan:
    """Times of a packing that was carried out."""

    trained: tuple[Trained, ...]
    begun: float
    """Time at which the first Series got its GPUs."""

    @property
    def seconds(self) -> float:
        return max(series.last for series in self.trained) - self.begun

    @property
    def bound(self) -> float:
        """Lower bound of every packing: the longest Series, or all GPU-seconds on all GPUs."""
        work = sum(series.seconds * series.ranks for series in self.trained)
        return max(work / GPUS, *(series.seconds for series in self.trained))

    @property
    def most_at_once(self) -> int:
        """Number of GPUs in use at the busiest moment."""
        moments = [series.first for series in self.trained]
        return max(
            sum(series.ranks for series in self.trained if series.first <= moment < series.last)
            for moment in moments
        )


def measure(root: Root, begun: float) -> Makespan:
    """Read the makespan from the journals of a root, whose Series were each trained in one attempt."""
    runs: dict[str, list[Path]] = {}
    for folder in (root.path / "runs").iterdir():
        runs.setdefault(read_run(folder).series_id, []).append(folder)
    trained = []
    for series_id, branches in sorted(runs.items()):
        trunk = list(read_events(root.series(series_id)))
        starts = [event for event in trunk if event["event"] in {Event.STARTED, Event.RESUMED}]
        assert len(starts) == 1, f"{series_id} was started {len(starts)} times"
        told = [*trunk, *(event for folder in branches for event in read_events(folder))]
        steps = [event["t"] for event in told if event["event"] == Event.STEP]
        trained.append(Trained(starts[0]["layout"]["ranks"], min(steps), max(steps)))
    return Makespan(tuple(trained), begun)


def test_the_bound_and_the_busiest_moment_are_those_of_the_journals() -> None:
    found = Makespan((Trained(4, 10.0, 20.0), Trained(4, 12.0, 30.0), Trained(1, 20.0, 50.0)), begun=5.0)
    assert found.seconds == 45.0
    assert found.bound == 30.0
    assert found.most_at_once == 8


@pytest.mark.cluster
@pytest.mark.verify
def test_packed_series_end_within_fifteen_hundredths_of_the_bound(
    make: Callable[..., SlurmStudy], study_fields: dict[str, Any]
) -> None:
    study_fields["grid"] = {
        "architectures": {name: {"iterations": [steps]} for name, steps in LENGTHS.items()},
        "sizes": {
            name: {"n_blocks": 1, "d_model": 8 * (1 + ranks), "resources": {"ranks": ranks, "micro_batch": 2}}
            for name, ranks in RANKS.items()
        },
        "iterations": [50],
        "seeds": [0, 1],
    }
    study_fields["tracking"] = {"log_every": 10}
    study = make(study_fields, name="packed", gpus=4, cores=8, memory_gib=8, signal_seconds=20)
    study.step_seconds = STEP_SECONDS
    asked = time.time()
    print(study.submit("--nodes", "2", "--yes", on="ray"))
    (array,) = study.arrays()
    assert len(array.tasks) == 24
    wait_until(lambda: len(_over(study.root)) == 24 or not study.queue(), 1500)
    said = "".join(path.read_text(errors="replace") for path in _outputs(study))
    assert len(_over(study.root)) == 24, said[-5000:]
    assert len(study.arrays()) == 1

    found = measure(study.root, _first_given(said))
    print(
        f"makespan {found.seconds:.1f} s, bound {found.bound:.1f} s, ratio {found.seconds / found.bound:.3f}; "
        f"{found.most_at_once} GPUs at the busiest; {found.begun - asked:.1f} s from submitting to a packed Ray"
    )
    print("\n".join(re.findall(r"^.*series .*: .*$", said, re.MULTILINE)))
    assert found.most_at_once <= GPUS
    assert found.seconds / found.bound <= 1.15


def _over(root: Root) -> list[Path]:
    """Return the Series that have finished."""
    return [
        folder
        for folder in (root.path / "series").iterdir()
        if any(event["event"] == Event.FINISHED for event in read_events(folder))
    ]


def _outputs(study: SlurmStudy) -> Iterator[Path]:
    return (
        path for path in study.root.study(study.fields["name"]).rglob("*") if path.suffix in {".out", ".log"}
    )


def _first_given(said: str) -> float:
    """Return the time at which the controller gave the first Series its GPUs."""
    times = re.findall(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) series .*: to ", said, re.MULTILINE)
    assert times, said[-5000:]
    return min(datetime.strptime(when, "%Y-%m-%d %H:%M:%S,%f").astimezone().timestamp() for when in times)
