"""Pruning: what goes is what nobody needs, and everything that could be trained before can be trained after."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from filelock import FileLock

from harness.archive.prune import Pruned
from harness.archive.prune import prune as prune_study
from harness.record import checkpoints
from harness.record.control import Control
from harness.record.root import Root
from tests.conftest import Command, Write, files_below, flip_a_byte
from tests.harness.bundles import with_iterations
from tests.harness.journals import registered
from tests.harness.trainer import (
    StopAfter,
    losses,
    prepared,
    progress_of,
    series_folder,
    train,
    trunk_steps,
    undisturbed,
)
from tests.studies import Fields


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path / "runs")


def prune(root: Root, fields: Fields, **how: bool) -> Pruned:
    return prune_study(registered(root, fields), **how)


def trunk_tags(root: Root) -> list[int]:
    return [held.marker.step for held in checkpoints.marked(series_folder(root) / "checkpoints")]


def assert_undisturbed(root: Root, fields: Fields) -> None:
    """The losses are those of the same study trained in one go."""
    assert losses(root, fields) == undisturbed(root.path.parent, fields)


def test_of_a_finished_study_the_newest_trunk_checkpoint_and_the_weights_stay(
    root: Root, study_fields: Fields
) -> None:
    fields = with_iterations(study_fields, 5, 10, 20)
    train(root, fields)
    assert trunk_tags(root) == [4, 8, 16]
    weights = [path for path in files_below(root.path) if path.endswith("model.safetensors")]
    before = sum(path.stat().st_size for path in root.path.rglob("checkpoints/**/*") if path.is_file())
    done = prune(root, fields)
    after = sum(path.stat().st_size for path in root.path.rglob("checkpoints/**/*") if path.is_file())
    assert [item.step for item in done.removed] == [4, 8]
    assert trunk_tags(root) == [16]
    assert [path for path in files_below(root.path) if path.endswith("model.safetensors")] == weights
    assert 0 < done.bytes <= before - after < 1.01 * done.bytes + 5000  # markers go too
    assert prune(root, fields).removed == []


def test_a_dry_run_tells_the_same_and_removes_nothing(root: Root, study_fields: Fields) -> None:
    fields = with_iterations(study_fields, 5, 10, 20)
    train(root, fields)
    registered(root, fields)
    before = files_below(root.path)
    told = prune(root, fields, dry_run=True)
    assert files_below(root.path) == before
    assert prune(root, fields).removed == told.removed != []


def test_what_was_pruned_is_written_down(root: Root, study_fields: Fields) -> None:
    fields = with_iterations(study_fields, 5, 10)
    train(root, fields)
    done = prune(root, fields)
    (event,) = Control(root.study("tiny") / "control.jsonl").read()
    assert (event["event"], event["bytes"]) == ("pruned", done.bytes)
    assert [item["step"] for item in event["removed"]] == [4]


def test_a_cancelled_run_keeps_its_branch_point_and_retry_goes_on_from_there(
    root: Root, study_fields: Fields
) -> None:
    fields = with_iterations(study_fields, 5, 10, 20)
    train(root, with_iterations(fields, 5, 20))
    ids = {point.run.iterations: point.run_id for point in registered(root, fields).points}
    control = Control(root.study("tiny") / "control.jsonl")
    control.append("cancelled", runs=[ids[10]])
    done = prune(root, fields)
    assert done.removed == []
    assert trunk_tags(root) == [4, 16]  # 4 is the newest at or below 8, where the run of 10 leaves
    control.append("retried", runs=[*ids.values()], attempts={})
    train(root, fields)
    assert trunk_steps(root) == [5, 6, 7, 8]
    assert_undisturbed(root, fields)


def test_a_failed_run_goes_on_from_its_own_decay_checkpoint(root: Root, study_fields: Fields) -> None:
    fields = with_iterations(study_fields, 5, 20)
    train(root, fields, StopAfter(19), checkpoint_every=1)  # in the branch of 20
    done = prune(root, fields)
    own = [item for item in done.kept if item.owner.startswith("run")]
    assert [item.why for item in own] == ["its decay goes on from it"]
    assert trunk_tags(root) == [16]
    step = own[0].step
    assert 16 < step < 20
    train(root, fields)
    attempt = progress_of(root, fields)[1]
    assert min(s for s, event in attempt.steps.items() if event["attempt"] == attempt.attempt) == step + 1
    assert_undisturbed(root, fields)


def test_an_extension_continues_the_trunk_after_pruning(root: Root, study_fields: Fields) -> None:
    train(root, with_iterations(study_fields, 5, 10))
    prune(root, with_iterations(study_fields, 5, 10))
    longer = with_iterations(study_fields, 5, 10, 20)
    train(root, longer)
    assert trunk_steps(root) == list(range(9, 17))
    assert_undisturbed(root, longer)


def test_a_length_inserted_after_pruning_only_starts_earlier(root: Root, study_fields: Fields) -> None:
    train(root, with_iterations(study_fields, 5, 20))
    prune(root, with_iterations(study_fields, 5, 20))
    between = with_iterations(study_fields, 5, 10, 20)
    train(root, between)
    assert trunk_steps(root) == list(range(1, 9))
    assert_undisturbed(root, between)


def test_what_another_study_still_needs_of_the_trunk_stays(root: Root, study_fields: Fields) -> None:
    fields = with_iterations(study_fields, 5, 10, 20)
    train(root, fields)
    registered(root, with_iterations(study_fields, 7, 20) | {"name": "other"})  # its run of 7 leaves at 6
    prune(root, fields)
    assert trunk_tags(root) == [4, 16]


def test_runs_of_a_study_that_cannot_be_read_are_wanted_as_far_as_they_have_begun(
    root: Root, study_fields: Fields
) -> None:
    fields = with_iterations(study_fields, 5, 10, 20)
    train(root, fields)
    prepared(root, with_iterations(study_fields, 7) | {"name": "other"})
    (root.study("other")).mkdir(parents=True)
    (root.study("other") / "study.json").write_text("{")
    done = prune(root, fields)
    assert trunk_tags(root) == [4, 16]
    assert any("other/study.json" in note for note in done.notes)


def test_a_series_in_training_is_left_alone_and_said_so(
    root: Root, study_fields: Fields, ssmscale: Command, write_study: Write
) -> None:
    train(root, study_fields)
    with FileLock(series_folder(root) / "lock"):
        answer = ssmscale("prune", write_study(study_fields), "--root", root.path)
    assert answer.status == 0, answer.err
    assert f"series {series_folder(root).name} is in training: left alone" in answer.out
    assert trunk_tags(root) == [4, 8]


def test_a_newer_checkpoint_that_is_merely_marked_replaces_none(root: Root, study_fields: Fields) -> None:
    fields = with_iterations(study_fields, 5, 10, 20)
    train(root, fields)
    flip_a_byte(series_folder(root) / "checkpoints" / "step-000000016" / "mp_rank_00_model_states.pt")
    done = prune(root, fields)
    assert [item.step for item in done.removed] == [4]
    assert trunk_tags(root) == [8, 16]
    assert any("cannot be verified" in item.why and "checksum" in item.why for item in done.kept)
    longer = with_iterations(study_fields, 5, 10, 20, 40)
    train(root, longer)  # resumes from 8 and condemns 16
    assert trunk_steps(root)[0] == 9
    assert_undisturbed(root, longer)
    prune(root, longer)
    assert trunk_tags(root) == [32]
    assert not list((series_folder(root) / "checkpoints").glob("*.damaged"))


@pytest.mark.parametrize(
    ("leave", "why"),
    [
        ("damaged", "found damaged when it was to be resumed from"),
        ("torn", "its files are not those its marker lists"),
        ("unmarked", "never completed"),
    ],
)
def test_what_can_never_be_resumed_from_goes(root: Root, study_fields: Fields, leave: str, why: str) -> None:
    fields = with_iterations(study_fields, 5, 10)
    train(root, fields)
    folder = series_folder(root) / "checkpoints"
    marker = folder / "step-000000008.complete"
    if leave == "damaged":
        marker.rename(marker.with_suffix(".damaged"))
    elif leave == "torn":
        (folder / "step-000000008" / "mp_rank_00_model_states.pt").write_bytes(b"short")
    else:
        marker.unlink()
    (folder / "notes.txt").write_text("somebody's own")
    done = prune(root, fields)
    assert [(item.step, item.why) for item in done.removed] == [(8, why)]
    assert trunk_tags(root) == [4]
    left = {"step-000000004", "step-000000004.complete", "notes.txt"}
    assert {path.name for path in folder.iterdir()} == left


def test_of_a_link_only_the_link_goes(root: Root, study_fields: Fields, tmp_path: Path) -> None:
    fields = with_iterations(study_fields, 5, 10)
    train(root, fields)
    tag, elsewhere = series_folder(root) / "checkpoints" / "step-000000004", tmp_path / "elsewhere"
    tag.rename(elsewhere)
    tag.symlink_to(elsewhere)
    before = files_below(elsewhere)
    assert [item.step for item in prune(root, fields).removed] == [4]
    assert not tag.is_symlink()
    assert files_below(elsewhere) == before != []


def test_a_checkpoint_whose_marker_this_version_cannot_read_stays(root: Root, study_fields: Fields) -> None:
    fields = with_iterations(study_fields, 5, 10)
    train(root, fields)
    for marker in (series_folder(root) / "checkpoints").glob("*.complete"):
        marker.write_text(json.dumps(json.loads(marker.read_text()) | {"from the future": 1}))
    done = prune(root, fields)
    assert done.removed == []
    assert all("step-00000000" in item.why and "from the future" in item.why for item in done.kept)


def test_the_best_checkpoint_stays_where_the_study_wants_it(root: Root, study_fields: Fields) -> None:
    fields = with_iterations(study_fields, 5, 10, 20)
    train(root, fields)
    held = checkpoints.marked(series_folder(root) / "checkpoints")
    for found, loss in zip(held, (3.0, 2.0, 2.5), strict=True):
        sealed = found.marker.sealed(loss=loss)
        (found.folder / f"{found.tag}.complete").write_text(sealed.model_dump_json())
    fields["resources"] = {"keep_best": True}
    done = prune(root, fields)
    assert [item.step for item in done.removed] == [4]
    assert {item.step: item.why for item in done.kept}[8] == "the best held-out loss (keep_best)"
    assert trunk_tags(root) == [8, 16]


def test_the_verb_prints_a_table_and_one_document(
    root: Root, study_fields: Fields, ssmscale: Command, write_study: Write
) -> None:
    fields = with_iterations(study_fields, 5, 10, 20)
    train(root, fields)
    study = write_study(fields)
    told = ssmscale("prune", study, "--dry-run", "--json").document
    assert [item["step"] for item in told["removed"]] == [4, 8]
    assert told["totals"]["gib_removed"] == pytest.approx(sum(item["gib"] for item in told["removed"]))
    answer = ssmscale("prune", study)
    assert "an older branch point" in answer.out
    assert "stays: 1 checkpoint" in answer.out
    assert "2 checkpoints, " in answer.out
    assert "0 checkpoints" in ssmscale("prune", study).out
