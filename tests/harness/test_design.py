"""`plan --design`: the expectations of a simulated study beside the plan, in the same document."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.conftest import Answer

Fields = dict[str, Any]
Command = Callable[..., Answer]


def test_the_design_joins_the_plans_notes_and_says_what_cannot_be_fitted(
    study_fields: Fields, write_study: Callable[..., Path], ssmscale: Command
) -> None:
    study = write_study(study_fields)
    answer = ssmscale("plan", study, "--design", "--json")
    assert answer.status == 0, answer.err
    design = json.loads(answer.out)["design"]
    assert {"law", "prior", "noise", "size_ratio", "architectures", "notes"} <= set(design)
    assert {"speed_assumed", "prior_assumed", "not_identified"} <= {note["code"] for note in design["notes"]}
    assert "Prefix SiMBA has 1 size" in ssmscale("plan", study, "--design").out


def test_a_prior_stated_in_the_study_is_taken_and_is_no_part_of_a_run(
    study_fields: Fields, write_study: Callable[..., Path], ssmscale: Command
) -> None:
    before = json.loads(ssmscale("plan", write_study(study_fields), "--json").out)["runs"]
    law = {"E": 1.5, "A": 900.0, "B": 2000.0, "alpha": 0.7, "beta": 0.6}
    study_fields["design"] = {"prior": {"prefix_simba": law}, "noise": {"series": 0.002, "run": 0.01}}
    plan = json.loads(ssmscale("plan", write_study(study_fields), "--design", "--json").out)
    assert plan["design"]["prior"] == {"prefix_simba": law}
    assert plan["design"]["noise"] == {"series": 0.002, "run": 0.01}
    assert plan["runs"] == before


def test_what_cannot_be_planned_with_is_refused_in_one_sentence(
    study_fields: Fields, write_study: Callable[..., Path], ssmscale: Command
) -> None:
    study = write_study(study_fields)
    for arguments, words in (
        (("--prior", "none.json"), "--design"),
        (("--design", "--prior", "none.json"), "none.json: no such file"),
        (("--design", "--law", "size"), "--law size"),
        (("--design", "--reference", "cross_simba"), "--reference cross_simba"),
    ):
        answer = ssmscale("plan", study, *arguments)
        assert (answer.status, len(answer.err.splitlines())) == (2, 1), answer.err
        assert words in answer.err
    study_fields["design"] = {"prior": {"cross_simba": {"E": 1, "A": 1, "B": 1, "alpha": 0.5, "beta": 0.5}}}
    assert "no law for prefix_simba" in ssmscale("plan", write_study(study_fields), "--design").err
