"""`plan --design`: a simulated study beside the plan, in the same document."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from harness.common.validation import yaml_text
from harness.plan.candidates import Candidates, candidates_of, grid_fields
from harness.record.root import Root
from harness.study.schema import load_study
from harness.submit.monitor import planned
from tests.conftest import Command, Write
from tests.harness.conftest import PlanOf
from tests.harness.journals import write_finished
from tests.studies import Fields


def test_the_design_adds_notes_on_laws_that_cannot_be_fitted(
    study_fields: Fields, write_study: Write, ssmscale: Command
) -> None:
    study = write_study(study_fields)
    design = ssmscale("plan", study, "--design", "--json").document["design"]
    assert {"law", "prior", "noise", "size_ratio", "architectures", "notes"} <= set(design)
    assert {"speed_assumed", "prior_assumed", "not_identified"} <= {note["code"] for note in design["notes"]}
    assert "Prefix SiMBA has 1 size" in ssmscale("plan", study, "--design").out


def test_a_prior_stated_in_the_study_is_taken_and_is_no_part_of_a_run(
    study_fields: Fields, plan_of: PlanOf
) -> None:
    before = plan_of(study_fields)["runs"]
    law = {"E": 1.5, "A": 900.0, "B": 2000.0, "alpha": 0.7, "beta": 0.6}
    study_fields["design"] = {"prior": {"prefix_simba": law}, "noise": {"series": 0.002, "run": 0.01}}
    plan = plan_of(study_fields, "--design")
    assert plan["design"]["prior"] == {"prefix_simba": law}
    assert plan["design"]["noise"] == {"series": 0.002, "run": 0.01}
    assert plan["runs"] == before


def test_options_that_cannot_be_used_are_refused_in_one_sentence(
    study_fields: Fields, write_study: Write, ssmscale: Command
) -> None:
    study = write_study(study_fields)
    for arguments, words in (
        (("--prior", "none.json"), "--design"),
        (("--design", "--prior", "none.json"), "none.json: there is no such file"),
        (("--design", "--law", "size"), "--law size"),
        (("--design", "--reference", "cross_simba"), "--reference cross_simba"),
        (("--budget", "1"), "two architectures"),
    ):
        answer = ssmscale("plan", study, *arguments)
        answer.assert_refused(words)
        assert len(answer.err.splitlines()) == 1
    study_fields["design"] = {"prior": {"cross_simba": {"E": 1, "A": 1, "B": 1, "alpha": 0.5, "beta": 0.5}}}
    assert "no law for prefix_simba" in ssmscale("plan", write_study(study_fields), "--design").err


@pytest.fixture
def three_sizes(study_fields: Fields) -> Fields:
    study_fields["grid"] |= {
        "architectures": {"prefix_simba": {"sizes": {"d8": {"d_state": 4}}}, "cross_transformer": None},
        "sizes": {f"d{d}": {"n_blocks": 1, "d_model": d} for d in (16, 8, 32)},
        "iterations": [10, 20, 40],
        "seeds": [0, 1],
    }
    return study_fields


@pytest.mark.parametrize("kind", ["wsd", "cosine"])
def test_a_grid_costs_as_much_as_its_plan(
    three_sizes: Fields, write_study: Write, tmp_path: Path, kind: str
) -> None:
    three_sizes["training"]["schedule"] |= {"kind": kind}
    _, made = planned(str(write_study(three_sizes)), tmp_path, None, None)
    there = candidates_of(made)
    assert [one.size for one in there.sizes] == ["d8", "d8", "d16", "d16", "d32", "d32"]
    assert set(there.counts) == {10, 14, 20, 28, 40}

    def cost(there: Candidates) -> float:
        return sum(
            there.hours(one.architecture, one.size, (10, 20, 40), seed)
            for one in there.sizes
            for seed in (0, 1)
        )

    whole = made.totals()["gpu_hours"]
    assert cost(there) == pytest.approx(whole, rel=1e-3)  # but for checkpoints that fall due within a run
    write_finished(
        Root(tmp_path), [run.status.point for run in made.runs if run.status.point.run.iterations < 40]
    )
    _, grown = planned(str(write_study(three_sizes)), tmp_path, None, None)
    assert cost(candidates_of(grown)) == pytest.approx(grown.totals()["gpu_hours"], rel=1e-3)
    assert grown.totals()["gpu_hours_reused"] > 0


def test_a_chosen_grid_is_pasted_as_it_is_written(three_sizes: Fields, write_study: Write) -> None:
    study = load_study(write_study(three_sizes))
    chosen = {"sizes": ["d16", "d32"], "iterations": [10, 40], "seeds": [0]}
    chosen["replicates"] = [{"sizes": ["d16"], "seeds": [1, 2, 3]}]
    written = yaml.safe_load(yaml_text({"grid": grid_fields(study, chosen)}))
    again = load_study(write_study(three_sizes | written))
    assert list(again.grid.sizes) == ["d16", "d32"]
    assert again.grid.iterations == (10, 40)
    assert again.grid.n_runs == 2 * (4 + 1) * 2
    assert again.grid.sizes["d32"] == study.grid.sizes["d32"]


def test_a_budget_too_small_for_any_grid_is_refused_with_the_least_one(
    three_sizes: Fields, write_study: Write, ssmscale: Command
) -> None:
    answer = ssmscale("plan", write_study(three_sizes), "--budget", "1e-9", "--json")
    assert (answer.status, answer.out, len(answer.err.splitlines())) == (2, "", 1)
    assert "GPU-hours" in answer.err
