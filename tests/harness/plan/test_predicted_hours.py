"""Times of the demo, predicted from one finished run of each architecture and then measured by real training."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from harness.common.validation import validate
from harness.plan.cluster import this_machine
from harness.plan.plan import make_plan
from harness.record.registry import resolve
from harness.record.root import Root
from harness.record.status import StatusReader
from harness.study.schema import Study
from harness.submit.submission import keep_calibration
from harness.train.stopping import StopFlag
from harness.train.worker import train_series
from tests.conftest import REPOSITORY
from tests.corpora import write_tiny_corpus
from tests.harness.trainer import prepared
from tests.studies import Fields

ITERATIONS = 100


def demo(folder: Path) -> dict[str, Any]:
    """The demo with one length, on a corpus of its shape."""
    text = (REPOSITORY / "sweeps" / "demo.yaml").read_text(encoding="utf-8")
    fields: Fields = yaml.safe_load(text)
    write_tiny_corpus(folder / "corpus", codebooks=2, frames=256, codebook_size=256)
    fields["corpus"] |= {"path": str(folder / "corpus")}
    fields["grid"] |= {"iterations": [ITERATIONS], "replicates": []}
    fields["training"]["eval_clips"] = 8
    return fields


def trained_seconds(root: Root, fields: Fields) -> dict[str, float]:
    """Train the missing runs of a study; return the seconds of each Series by its id."""
    taken = {}
    for place, runs in prepared(root, fields):
        begun = time.process_time()
        assert train_series(runs, place, StopFlag()) == "finished"
        taken[runs[0].series_id] = time.process_time() - begun
    return taken


@pytest.mark.verify
def test_eight_of_ten_times_are_predicted_from_one_run_of_each_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The processor time of one thread equals the wall time on an idle machine, and does not depend on other processes.
    monkeypatch.setattr("harness.train.loop.time", SimpleNamespace(monotonic=time.process_time))
    fields, root = demo(tmp_path), Root(tmp_path / "runs")
    first = copy.deepcopy(fields)
    first["grid"]["sizes"] = {"m": first["grid"]["sizes"]["m"]}
    measured = trained_seconds(root, first)
    study = validate(Study, fields, "test")
    resolved = resolve(study, root, "test")
    keep_calibration(resolved, StatusReader(root, study.name).read(resolved.points))
    made = make_plan(study, resolved.points, resolved.corpus, root, this_machine())
    hours = {run.status.series_id: run.hours_alone for run in made.runs}
    measured = trained_seconds(root, fields) | measured
    near = 0
    for point in resolved.points:
        expected, took = hours[point.series_id] * 3600, measured[point.series_id]
        off = expected.expected / took - 1
        near += abs(off) <= 0.25
        print(
            f"{point.architecture:<18} {point.size:<3} predicted {expected.expected:6.1f} s ({expected.low:.1f} to "
            f"{expected.high:.1f}), measured {took:6.1f} s, {off:+.0%}"
        )
    assert len(resolved.points) == 10
    assert near >= 8
