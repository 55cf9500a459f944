"""Pruning removes what no run needs, and all that could be trained before can be trained after it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from filelock import FileLock

from harness.archive.prune import Pruned
from harness.archive.prune import prune as prune_study
from harness.record import checkpoints
from harness.record.control import Control
from harness.record.journal import read_progress
from harness.record.registry import Registration
from harness.record.root import Root
from harness.study.grid import GridPoint
from tests.conftest import Command, Write, files_below, flip_a_byte
from tests.harness.journals import registered
from tests.harness.trainer import StopAfter, losses, prepared, series_folder, train, trunk_steps, undisturbed
from tests.programs import peak_mib
from tests.studies import Fields, tiny_study, with_iterations


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path / "runs")


@pytest.fixture
def fields(study_fields: Fields) -> Fields:
    return with_iterations(study_fields, 5, 10, 20)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path) -> Root:
    """A ROOT with a finished study of three runs; tests copy it."""
    root = Root(tmp_path_factory.mktemp("pristine") / "runs")
    train(root, with_iterations(tiny_study(tiny_corpus), 5, 10, 20))
    return root


@pytest.fixture
def trained(root: Root, pristine: Root) -> Root:
    shutil.copytree(pristine.path, root.path)
    return root


def prune(root: Root, fields: Fields, **how: bool) -> Pruned:
    return prune_study(registered(root, fields), **how)


def trunk_tags(root: Root) -> list[int]:
    return [held.marker.step for held in checkpoints.marked(series_folder(root) / "checkpoints")]


def test_of_a_finished_study_the_newest_trunk_checkpoint_and_the_weights_stay(
    trained: Root, fields: Fields
) -> None:
    assert trunk_tags(trained) == [4, 8, 16]
    weights = [path for path in files_below(trained.path) if path.endswith("model.safetensors")]
    before = sum(path.stat().st_size for path in trained.path.rglob("checkpoints/**/*") if path.is_file())
    done = prune(trained, fields)
    after = sum(path.stat().st_size for path in trained.path.rglob("checkpoints/**/*") if path.is_file())
    assert [item.step for item in done.removed] == [4, 8]
    assert trunk_tags(trained) == [16]
    assert [path for path in files_below(trained.path) if path.endswith("model.safetensors")] == weights
    assert 0 < done.bytes <= before - after < 1.01 * done.bytes + 5000  # markers go too
    (event,) = Control(trained.study("tiny") / "control.jsonl").read()
    assert (event["event"], event["bytes"]) == ("pruned", done.bytes)
    assert [item["step"] for item in event["removed"]] == [4, 8]
    assert prune(trained, fields).removed == []


def test_a_cancelled_run_keeps_its_branch_point_and_retry_goes_on_from_there(
    root: Root, fields: Fields
) -> None:
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
    assert losses(root, fields) == undisturbed(fields)


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
    attempt = read_progress(root.run(own[0].owner.removeprefix("run ")))
    assert min(s for s, event in attempt.steps.items() if event["attempt"] == attempt.attempt) == step + 1
    assert losses(root, fields) == undisturbed(fields)


@pytest.mark.parametrize(
    ("before", "steps"), [((5, 10), range(9, 17)), ((5, 20), range(1, 9))], ids=["longer", "between"]
)
def test_after_pruning_an_extension_continues_the_trunk_and_a_length_between_starts_it_again(
    root: Root, fields: Fields, before: tuple[int, int], steps: range
) -> None:
    train(root, with_iterations(fields, *before))
    prune(root, with_iterations(fields, *before))
    train(root, fields)
    assert trunk_steps(root) == list(steps)
    assert losses(root, fields) == undisturbed(fields)


def test_checkpoints_that_another_study_needs_stay(trained: Root, fields: Fields) -> None:
    registered(trained, with_iterations(fields, 7, 20) | {"name": "other"})  # its run of 7 leaves at 6
    prune(trained, fields)
    assert trunk_tags(trained) == [4, 16]


def test_of_other_studies_only_what_may_share_a_series_is_expanded(
    trained: Root, fields: Fields, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = registered(trained, fields)
    held = json.loads((trained.study("tiny") / "study.json").read_text())
    for name, fingerprint in (
        ("alike", own.corpus.fingerprint),
        *((f"other{i}", f"{i:064x}") for i in range(1, 9)),
    ):
        held["study"]["name"], held["corpus"]["fingerprint"] = name, fingerprint
        trained.study(name).mkdir()
        (trained.study(name) / "study.json").write_text(json.dumps(held))
    expanded, seen = list[str](), list[tuple[int, int]]()
    expand = Registration.expand

    def counted(registration: Registration, where: str) -> tuple[GridPoint, ...]:
        expanded.append(registration.study.name)
        return expand(registration, where)

    monkeypatch.setattr(Registration, "expand", counted)
    done = prune_study(own, progress=lambda done, total: seen.append((done, total)))
    assert expanded == ["alike", "tiny"]
    assert [item.step for item in done.removed] == [4, 8]
    assert seen == [(number, 3 + 10 + 3) for number in range(16)]  # runs, studies, and the runs again


@pytest.mark.verify
def test_twenty_thousand_studies_take_no_memory(trained: Root, fields: Fields) -> None:
    registered(trained, fields)
    held = json.loads((trained.study("tiny") / "study.json").read_text())
    for number in range(20_000):
        held["study"]["name"] = f"other{number}"
        trained.study(f"other{number}").mkdir()
        (trained.study(f"other{number}") / "study.json").write_text(json.dumps(held))
    assert (
        peak_mib("prune", "tiny", "--root", trained.path) < 768
    )  # torch, which checks checkpoints, takes most


def test_begun_runs_of_an_unreadable_study_keep_their_checkpoints(trained: Root, fields: Fields) -> None:
    prepared(trained, with_iterations(fields, 7) | {"name": "other"})
    (trained.study("other")).mkdir(parents=True)
    (trained.study("other") / "study.json").write_text("{")
    done = prune(trained, fields)
    assert trunk_tags(trained) == [4, 16]
    assert any("other/study.json" in note for note in done.notes)


def test_a_newer_checkpoint_that_is_damaged_replaces_none(trained: Root, fields: Fields) -> None:
    folder = series_folder(trained) / "checkpoints"
    flip_a_byte(folder / "step-000000016" / "mp_rank_00_model_states.pt")
    done = prune(trained, fields)
    assert [item.step for item in done.removed] == [4]
    assert trunk_tags(trained) == [8, 16]
    assert any("cannot be verified" in item.why and "checksum" in item.why for item in done.kept)
    longer = with_iterations(fields, 5, 10, 20, 40)
    train(trained, longer)  # resumes from 8 and condemns 16
    assert trunk_steps(trained)[0] == 9
    assert losses(trained, longer) == undisturbed(longer)
    prune(trained, longer)
    assert trunk_tags(trained) == [32]
    assert not list(folder.glob("*.damaged"))


@pytest.mark.parametrize(
    ("leave", "why"),
    [
        ("damaged", "found damaged when a trainer resumed"),
        ("torn", "its files are not those in its marker"),
        ("unmarked", "never completed"),
    ],
)
def test_checkpoints_that_no_trainer_resumes_from_go(
    trained: Root, fields: Fields, leave: str, why: str
) -> None:
    folder = series_folder(trained) / "checkpoints"
    marker = folder / "step-000000016.complete"
    if leave == "damaged":
        marker.rename(marker.with_suffix(".damaged"))
    elif leave == "torn":
        (folder / "step-000000016" / "mp_rank_00_model_states.pt").write_bytes(b"short")
    else:
        marker.unlink()
    (folder / "notes.txt").write_text("a user's own")
    done = prune(trained, fields)
    assert [(item.step, item.why) for item in done.removed if item.step != 4] == [(16, why)]
    assert trunk_tags(trained) == [8]
    left = {"step-000000008", "step-000000008.complete", "notes.txt"}
    assert {path.name for path in folder.iterdir()} == left


@pytest.mark.parametrize("linked", ["checkpoints", "."])
def test_checkpoints_that_a_link_leads_to_stay(
    trained: Root, fields: Fields, tmp_path: Path, linked: str
) -> None:
    place, elsewhere = series_folder(trained) / linked, tmp_path / "elsewhere"
    place.rename(elsewhere)
    place.absolute().symlink_to(elsewhere)
    before = files_below(elsewhere)
    done = prune(trained, fields)
    assert files_below(elsewhere) == before
    assert any("leads out of" in note for note in done.notes)
    assert not [item for item in done.removed if item.owner.startswith("series")]


def test_of_a_link_only_the_link_goes(trained: Root, fields: Fields, tmp_path: Path) -> None:
    tag, elsewhere = series_folder(trained) / "checkpoints" / "step-000000004", tmp_path / "elsewhere"
    tag.rename(elsewhere)
    tag.symlink_to(elsewhere)
    before = files_below(elsewhere)
    assert [item.step for item in prune(trained, fields).removed] == [4, 8]
    assert not tag.is_symlink()
    assert files_below(elsewhere) == before != []


def test_a_checkpoint_whose_marker_this_version_cannot_read_stays(trained: Root, fields: Fields) -> None:
    for marker in (series_folder(trained) / "checkpoints").glob("*.complete"):
        marker.write_text(json.dumps(json.loads(marker.read_text()) | {"from the future": 1}))
    done = prune(trained, fields)
    assert done.removed == []
    assert all("step-0000000" in item.why and "from the future" in item.why for item in done.kept)


def test_the_best_checkpoint_stays_where_the_study_wants_it(trained: Root, fields: Fields) -> None:
    held = checkpoints.marked(series_folder(trained) / "checkpoints")
    for found, loss in zip(held, (3.0, 2.0, 2.5), strict=True):
        sealed = found.marker.sealed(loss=loss)
        (found.folder / f"{found.tag}.complete").write_text(sealed.model_dump_json())
    fields["resources"] = {"keep_best": True}
    done = prune(trained, fields)
    assert [item.step for item in done.removed] == [4]
    assert {item.step: item.why for item in done.kept}[8] == "the best held-out loss (keep_best)"
    assert trunk_tags(trained) == [8, 16]


def test_the_verb_leaves_a_series_in_training_alone_and_prints_a_table_and_one_document(
    trained: Root, fields: Fields, ssmscale: Command, write_study: Write
) -> None:
    study = write_study(fields)
    with FileLock(series_folder(trained) / "lock"):
        answer = ssmscale("prune", study, "--root", trained.path)
    assert answer.status == 0, answer.err
    assert f"series {series_folder(trained).name} is in training: left alone" in answer.out
    assert trunk_tags(trained) == [4, 8, 16]
    document = ssmscale("prune", study, "--dry-run", "--json").document
    assert [item["step"] for item in document["removed"]] == [4, 8]
    assert document["totals"]["gib_removed"] == pytest.approx(
        sum(item["gib"] for item in document["removed"])
    )
    answer = ssmscale("prune", study)
    assert "an older branch point" in answer.out
    assert "stays: 1 checkpoint" in answer.out
    assert "2 checkpoints, " in answer.out
    assert "0 checkpoints" in ssmscale("prune", study).out
