"""Scores of evaluations are exported with their runs, and imports add them to the scores that are there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from filelock import FileLock

from harness.record.root import Root
from harness.record.scores import evaluation_folder, evaluation_rows, keep_evaluation
from tests.conftest import Command
from tests.harness.bundles import exported, imported, members_of, rewritten
from tests.harness.fuzzing import hashes
from tests.harness.journals import registered
from tests.harness.scores import SETTINGS, scored
from tests.studies import Fields


@pytest.fixture
def evaluated(copied: Root, fields: Fields) -> Root:
    """Two finished runs, one of them evaluated in two ways."""
    run_id = first_run(copied, fields)
    keep_evaluation(copied, run_id, scored(None, ce=4.0))
    keep_evaluation(copied, run_id, scored(SETTINGS, ("few clips",), fd_a=1.0, fd_b=2.0))
    return copied


@pytest.fixture
def bare(there: Path, tmp_path: Path) -> Root:
    """The same two runs, neither evaluated."""
    shutil.copytree(there, tmp_path / "bare")
    return Root(tmp_path / "bare")


def first_run(root: Root, fields: Fields) -> str:
    run_id: str = registered(root, fields).points[0].run_id
    return run_id


def scores(root: Root, fields: Fields) -> dict[tuple[str, str], float]:
    return {(row.metric, row.settings): row.value for row in evaluation_rows(registered(root, fields))}


def test_scores_come_with_the_runs_and_once(
    evaluated: Root, here: Root, fields: Fields, tmp_path: Path, ssmscale: Command
) -> None:
    registered(evaluated, fields)
    answer = ssmscale("export", "tiny", "--root", evaluated.path, "--out", tmp_path / "b.zip")
    assert "2 runs in 1 series, 2 evaluations" in answer.out
    answer = ssmscale("import", tmp_path / "b.zip")
    assert "2 runs imported, 0 finished here already, 2 evaluations added" in answer.out
    assert scores(here, fields) == scores(evaluated, fields)
    assert len(scores(here, fields)) == 3
    before = hashes(here.path)
    assert "2 finished here already\n" in ssmscale("import", tmp_path / "b.zip").out
    assert hashes(here.path) == before
    again = exported(here, fields, tmp_path / "again.zip")
    assert again.read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_scores_join_those_that_are_here_and_replace_none(
    evaluated: Root, bare: Root, fields: Fields, tmp_path: Path
) -> None:
    run_id = first_run(bare, fields)
    keep_evaluation(bare, run_id, scored(SETTINGS, ("short clips",), fd_a=1.5, fd_c=3.0))
    assert imported(exported(evaluated, fields, tmp_path / "b.zip"), bare).evaluations == 2
    assert scores(bare, fields) == {
        ("ce", "held-out"): 4.0,
        **{(name, SETTINGS.digest): value for name, value in (("fd_a", 1.5), ("fd_b", 2.0), ("fd_c", 3.0))},
    }
    kept = (evaluation_folder(bare, run_id) / f"{SETTINGS.digest}.json").read_text()
    assert kept.index("short clips") < kept.index("few clips")


def test_a_run_that_is_being_evaluated_gets_its_scores_at_another_import(
    evaluated: Root, bare: Root, fields: Fields, tmp_path: Path, ssmscale: Command
) -> None:
    bundle, run_id = exported(evaluated, fields, tmp_path / "b.zip"), first_run(bare, fields)
    evaluation_folder(bare, run_id).mkdir()
    with FileLock(evaluation_folder(bare, run_id) / "lock"):
        answer = ssmscale("import", bundle, "--root", bare.path)
    assert (answer.status, f"note: run {run_id}: is being evaluated here" in answer.out) == (0, True)
    assert scores(bare, fields) == {}
    ssmscale("import", bundle, "--root", bare.path)
    assert len(scores(bare, fields)) == 3


def test_a_copy_of_scores_beside_them_is_no_member(
    evaluated: Root, fields: Fields, tmp_path: Path, ssmscale: Command
) -> None:
    registered(evaluated, fields)
    folder = evaluation_folder(evaluated, first_run(evaluated, fields))
    shutil.copy(folder / "held-out.json", folder / "held-out-old.json")
    ssmscale("export", "tiny", "--root", evaluated.path, "--out", tmp_path / "b.zip").assert_refused(
        "held-out-old.json"
    )
    assert not (tmp_path / "b.zip").exists()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("held-out", scored(SETTINGS).model_dump_json(), "holds results for the settings"),
        ("0123456789ab", scored(SETTINGS).model_dump_json(), "holds results for the settings"),
        ("held-out", '{"n_prompts": 4, "scores": {"ce": {"value": "low", "t": 1}}}', "scores.ce.value"),
        ("held-out", '{"n_prompts": 4, "scores": {"../ce": {"value": 1.0, "t": 1}}}', "../ce"),
        ("held-out", "[" * 100_000, "held-out.json"),
        ("../../run", "{}", "is not the name of"),
        ("lock", "", "is not the name of"),
    ],
)
def test_damaged_or_misnamed_scores_are_refused_and_nothing_is_written(
    bundle: Path, here: Root, tmp_path: Path, ssmscale: Command, name: str, content: str, said: str
) -> None:
    members = members_of(bundle)
    run = next(key for key in members if key.endswith("run.json")).removesuffix("run.json")
    spoilt = members | {f"{run}evaluation/{name}.json": content.encode()}
    ssmscale("import", rewritten(spoilt, tmp_path / "bad.zip")).assert_refused("bad.zip", said)
    assert not here.path.exists()


def test_scores_of_a_run_that_is_not_in_the_bundle_are_refused(
    bundle: Path, here: Root, tmp_path: Path, ssmscale: Command
) -> None:
    stray = {"runs/0123456789ab/evaluation/held-out.json": scored(None).model_dump_json().encode()}
    ssmscale("import", rewritten(members_of(bundle) | stray, tmp_path / "bad.zip")).assert_refused(
        "0123456789ab"
    )
    assert not here.path.exists()
