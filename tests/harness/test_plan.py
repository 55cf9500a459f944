"""The plan: exact counts, what trunks save, and the JSON other programs read."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.cluster import Cluster, choose_layout, choose_resources
from harness.rundir import Root
from harness.study import load_study
from harness.submission import resolve
from ssmttm.errors import InputError
from tests.conftest import Answer
from tests.harness.trainer import train

Fields = dict[str, Any]


def test_the_document_has_what_other_programs_read(
    study_fields: Fields, write_study: Callable[..., Path], ssmscale: Callable[..., Answer]
) -> None:
    plan = json.loads(ssmscale("plan", write_study(study_fields), "--json").out)
    assert set(plan) == {"study", "runs", "totals", "design"}
    row = plan["runs"][0]
    assert {
        *(
            "run_id",
            "series",
            "architecture",
            "n_params",
            "n_params_non_embedding",
            "iterations",
            "tokens",
            "flops",
        ),
        *("seed", "state", "nodes", "gpus", "zero_stage", "micro_batch", "accumulation", "memory_gib"),
        *("wall_hours", "gpu_hours"),
    } <= set(row)
    assert (row["state"], row["tokens"]) == ("new", 5 * 8 * 50 * 2)
    assert plan["totals"]["series"] == 1


def test_a_shared_trunk_is_paid_for_once(
    study_fields: Fields, write_study: Callable[..., Path], ssmscale: Callable[..., Answer]
) -> None:
    study_fields["grid"]["iterations"] = [10, 20, 40]
    totals = json.loads(ssmscale("plan", write_study(study_fields), "--json").out)["totals"]
    # Trunk to 32 steps and decays of 2, 4 and 8: 46 steps where 70 would be taken alone.
    assert totals["gpu_hours"] / totals["gpu_hours_independent"] == pytest.approx(46 / 70)


def test_what_is_finished_costs_nothing_more(
    study_fields: Fields, write_study: Callable[..., Path], ssmscale: Callable[..., Answer]
) -> None:
    train(Root(Path("runs").absolute()), study_fields)
    longer = copy.deepcopy(study_fields)
    longer["grid"]["iterations"] = [5, 10, 20]
    plan = json.loads(ssmscale("plan", write_study(longer), "--json").out)
    assert [run["state"] for run in plan["runs"]] == ["done", "done", "new"]
    assert plan["totals"]["gpu_hours"] == pytest.approx(plan["runs"][2]["gpu_hours"])
    assert plan["totals"]["gpu_hours_independent"] / plan["totals"]["gpu_hours"] == pytest.approx(20 / 12)


def test_failed_and_cancelled_runs_are_nothing_to_spend(
    study_fields: Fields, write_study: Callable[..., Path], ssmscale: Callable[..., Answer]
) -> None:
    study = write_study(study_fields)
    whole = json.loads(ssmscale("plan", study, "--json").out)
    ssmscale("cancel", study, whole["runs"][1]["run_id"])
    left = json.loads(ssmscale("plan", study, "--json").out)
    assert left["totals"]["gpu_hours"] == pytest.approx(whole["runs"][0]["gpu_hours"])


def test_planning_a_corpus_that_is_elsewhere_gives_null_ids(
    study_fields: Fields, write_study: Callable[..., Path], ssmscale: Callable[..., Answer]
) -> None:
    facts = {"n_codebooks": 2, "codebook_size": 64, "frames": 50, "clips": 48}
    study_fields["corpus"] = {"path": "elsewhere", "facts": facts}
    plan = json.loads(ssmscale("plan", write_study(study_fields), "--json").out)
    assert {run["run_id"] for run in plan["runs"]} == {None}
    assert "corpus_unknown" in {note["code"] for note in plan["design"]["notes"]}


@pytest.mark.parametrize(
    ("batch", "ranks", "most", "micro", "accumulation"),
    [(32, 1, 32, 32, 1), (32, 2, 32, 16, 1), (32, 2, 5, 4, 4), (12, 3, 3, 2, 2), (7, 7, 4, 1, 1)],
)
def test_the_global_batch_is_met_exactly(
    batch: int, ranks: int, most: int, micro: int, accumulation: int
) -> None:
    layout = choose_layout(batch, ranks, most, 0, 1)
    assert (layout.micro_batch, layout.accumulation) == (micro, accumulation)
    assert layout.micro_batch * layout.accumulation * layout.ranks == batch


def test_ranks_that_do_not_divide_the_batch_are_refused() -> None:
    with pytest.raises(InputError, match=r"batch.*8.*3 ranks"):
        choose_layout(8, 3, 8, 0, 1)


def test_a_small_memory_takes_smaller_micro_batches(
    study_fields: Fields, write_study: Callable[..., Path]
) -> None:
    path = write_study(study_fields)
    study = load_study(path)
    run = resolve(study, Root(Path("runs")), str(path)).points[0].run
    roomy = choose_resources(run, study.resources, Cluster("roomy", 1, 0, 2, 16.0))
    tight = choose_resources(run, study.resources, Cluster("tight", 1, 0, 2, 0.01))
    assert roomy.micro_batch == 8 > tight.micro_batch
