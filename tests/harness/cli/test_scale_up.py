"""`scale-up`: proposals are kept beside the study, and compared with the runs that finish later."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from harness.record.registry import add_record, read_records
from harness.record.root import Root
from harness.study.grid import GridPoint
from ssmttm.model.flops import parameter_count
from tests.conftest import Command
from tests.harness.fuzzing import refused
from tests.harness.journals import begin_run, begin_series, finish, registered
from tests.studies import Fields


def loss_of(point: GridPoint) -> float:
    """Loss by a law, with noise that the run id decides."""
    n_params = parameter_count(point.run.model).n_params
    off = np.random.default_rng(int(point.run_id, 16)).normal()
    return float((1.0 + 200 / n_params**0.6 + 9 / point.run.iterations**0.7) * np.exp(0.002 * off))


def train(root: Root, points: Sequence[GridPoint]) -> None:
    """Journals of these Runs as if they had been trained."""
    for point in points:
        run = point.run
        begin_series(root, run).close()
        flops, n_params = 1e6 * run.iterations, parameter_count(run.model).n_params
        finish(begin_run(root, run), run, loss=loss_of(point), n_params=n_params, flops=flops)


@pytest.fixture
def fields(study_fields: Fields) -> Fields:
    study_fields["grid"] |= {
        "sizes": {f"d{d}": {"n_blocks": 1, "d_model": d} for d in (8, 16, 32, 64)},
        "iterations": [10, 20, 40],
    }
    return study_fields


@pytest.fixture
def trained(fields: Fields, tracked_root: Root) -> None:
    """The study with every run of it finished."""
    train(tracked_root, registered(tracked_root, fields).points)


@pytest.mark.usefixtures("trained")
def test_a_step_is_foreseen_kept_and_later_compared_with_what_was_seen(
    fields: Fields, tracked_root: Root, ssmscale: Command
) -> None:
    first = ssmscale("scale-up", "tiny", "--budget", "0.001", "--json").document
    (step,) = first["proposed"]["steps"]
    assert step["gpu_hours"] <= 0.001 * (1 + 1e-9)
    assert step["run95"][0] < step["loss"] < step["run95"][1]
    assert first["seen"] == []
    kept = tracked_root.study("tiny") / "scale_up.json"
    ssmscale("scale-up", "tiny", "--budget", "0.001")
    (record,) = json.loads(kept.read_text())
    assert {key: value for key, value in record.items() if key != "made"} == first["proposed"]
    assert "no run has finished yet" in ssmscale("scale-up", "tiny").out

    fields["grid"]["sizes"]["d128"] = {"n_blocks": 1, "d_model": 128}
    grown = registered(tracked_root, fields)
    train(tracked_root, [point for point in grown.points if point.size == "d128"])
    seen = ssmscale("scale-up", "tiny", "--json").document["seen"]
    assert [one["iterations"] for one in seen] == [10, 20, 40]
    assert max(abs(one["relative_error"]) for one in seen) < 0.02
    assert {one["run_id"] for one in seen} == {p.run_id for p in grown.points if p.size == "d128"}
    assert "predicted and seen" in ssmscale("scale-up", "tiny").out
    assert len(json.loads(kept.read_text())) == 1


@pytest.mark.usefixtures("trained")
def test_a_proposal_whose_runs_have_left_the_study_is_passed_over(
    fields: Fields, tracked_root: Root, ssmscale: Command
) -> None:
    assert ssmscale("scale-up", "tiny", "--budget", "0.001").status == 0
    fields["training"]["batch"] *= 2  # other runs, every one
    train(tracked_root, registered(tracked_root, fields).points)
    answer = ssmscale("scale-up", "tiny", "--budget", "0.001", "--json")
    assert answer.document["seen"] == []
    assert "cannot be compared: none of the 12 runs from which it was made" in answer.err
    assert len(read_records(tracked_root, "tiny")) == 2


@pytest.mark.usefixtures("trained")
def test_the_report_of_a_study_is_one_file_with_its_command(ssmscale: Command, tmp_path: Path) -> None:
    document = ssmscale("fit", "tiny", "--json").document
    assert document["architectures"]["prefix_simba"]["n_points"] == 12
    reported = ssmscale("report", "tiny", "--out", tmp_path / "report")
    assert reported.status == 0, reported.err
    page = Path(reported.out.strip())
    assert page == tmp_path / "report" / "report.html"
    assert json.loads((tmp_path / "report" / "fit.json").read_text()) == document
    text = page.read_text()
    assert "ssmscale report" in text
    assert not re.search(r"<(script|link|img|iframe)[^>]*(src|href)=.?https?:", text)  # nothing is fetched


def test_proposals_made_at_once_are_all_kept(tmp_path: Path) -> None:
    root = Root(tmp_path)

    def propose(number: int) -> None:
        for budget in range(3):
            add_record(root, "tiny", {"number": number, "budget": budget, "notes": "n" * 20_000})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(propose, range(8)))
    kept = {(one["number"], one["budget"]) for one in read_records(root, "tiny")}
    assert kept == {(number, budget) for number in range(8) for budget in range(3)}


def test_nothing_is_foreseen_without_a_budget_or_from_nothing(
    fields: Fields, tracked_root: Root, ssmscale: Command
) -> None:
    fields["training"]["schedule"] = {"warmup": 8}
    resolved = registered(tracked_root, fields)
    assert "submit it first" in ssmscale("scale-up", "tiny", "--budget", "1").err
    train(tracked_root, resolved.points)
    shortest = "the 10 iterations of the shortest run (training.schedule.warmup is 8)"
    for arguments, *words in (
        ((), "give --budget GPU_HOURS"),
        (("--budget", "-1"), "--budget -1"),
        (("--budget", "1", "--law", "data"), "--law data"),
        (("--budget", "1e-9"), "--budget: 1e-09 GPU-hours", shortest),
    ):
        assert refused(ssmscale("scale-up", "tiny", *arguments), *words)
    assert not (tracked_root.study("tiny") / "scale_up.json").exists()
    (tracked_root.study("tiny") / "scale_up.json").write_text("{}")
    assert "scale_up.json" in ssmscale("scale-up", "tiny").err
