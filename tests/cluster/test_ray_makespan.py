"""24 Series of one, two and four GPUs in one allocation of two nodes: GPUs idle only while ranks start.

Steps come at a given pace (`paced`), slow enough for eight ranks on two cores, so that the test measures the packing. A
Series counts from its first step to its last in its journal. The time between two Series on a GPU is loss, with the
imports and starts of ranks. The start of Ray is printed apart.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from harness.record.journal import Event
from harness.record.root import Root, read_run
from tests.cluster.slurm_study import SlurmStudy
from tests.harness.journals import read_events
from tests.waiting import wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.verify]

STEP_SECONDS = 1.0
LENGTHS = {"prefix_mamba": 30, "prefix_simba": 50, "cross_simba": 80, "cross_transformer": 120}
"""Steps by architecture: half a minute to two, of which a start takes a larger share than of a real Series."""
RANKS = {"one": 1, "two": 2, "four": 4}
GPUS = 8


class Trained(NamedTuple):
    """Ranks of a Series, and its first and last step by its journal, in seconds since the epoch."""

    ranks: int
    first: float
    last: float


def trained(root: Root) -> Iterator[Trained]:
    """Read the journals of a root, whose Series were each trained in one attempt."""
    runs: dict[str, list[Path]] = {}
    for folder in (root.path / "runs").iterdir():
        runs.setdefault(read_run(folder).series_id, []).append(folder)
    for series_id, branches in sorted(runs.items()):
        trunk = list(read_events(root.series(series_id)))
        starts = [event for event in trunk if event["event"] in {Event.STARTED, Event.RESUMED}]
        assert len(starts) == 1, f"{series_id} was started {len(starts)} times"
        told = [*trunk, *(event for folder in branches for event in read_events(folder))]
        steps = [event["t"] for event in told if event["event"] == Event.STEP]
        yield Trained(starts[0]["layout"]["ranks"], min(steps), max(steps))


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

    found, begun = list(trained(study.root)), _first_given(said)
    makespan = max(series.last for series in found) - begun
    seconds = [series.last - series.first for series in found]
    work = sum(each * series.ranks for each, series in zip(seconds, found, strict=True))
    bound = max(work / GPUS, *seconds)  # no packing ends sooner
    busiest = max(
        sum(other.ranks for other in found if other.first <= one.first < other.last) for one in found
    )
    print(
        f"makespan {makespan:.1f} s, bound {bound:.1f} s, ratio {makespan / bound:.3f}; "
        f"{busiest} GPUs at the busiest; {begun - asked:.1f} s from submitting to a packed Ray"
    )
    print("\n".join(re.findall(r"^.*series .*: .*$", said, re.MULTILINE)))
    assert busiest <= GPUS
    assert makespan / bound <= 1.15


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
