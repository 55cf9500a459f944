"""Bundles: a study on another machine is the same study, and an import changes nothing that was there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from filelock import FileLock

from harness.record.journal import Event, Journal, attempts, read_progress
from harness.record.root import Root, write_run, write_series
from tests.conftest import Command, Write
from tests.harness.bundles import exported, imported, members_of, rewritten
from tests.harness.fuzzing import hashes
from tests.harness.journals import registered
from tests.harness.trainer import StopAfter, losses, prepared, train
from tests.studies import Fields, tiny_study, with_iterations


def points_in(bundle: Path) -> list[bytes]:
    return members_of(bundle)["points.csv"].splitlines()


def test_a_bundle_holds_identities_and_journals_and_nothing_of_the_host(bundle: Path, there: Path) -> None:
    members = members_of(bundle)
    kinds = {Path(name).name for name in members if "/journal/" not in name}
    assert kinds == {"bundle.json", "study.json", "points.csv", "run.json", "series.json"}
    contents = json.loads(members["bundle.json"])
    assert (contents["format"], contents["study"]) == (1, "tiny")
    assert contents["counts"] == {"runs": 2, "series": 1, "journals": 3}
    assert str(there) not in members["bundle.json"].decode()
    assert len(points_in(bundle)) == 1 + 2


@pytest.mark.parametrize("whose", ["exported", "made by hand"])
def test_no_bundle_names_a_server_to_the_user_who_imports_it(
    copied: Root, here: Root, fields: Fields, tmp_path: Path, whose: str
) -> None:
    fields["tracking"] = {"uri": "http://me:secret@tracker.example.org:5000"}
    search = {"training.optimiser.lr": {"low": 1e-3, "high": 1e-2}}
    fields["tune"] = {"sizes": ["xs"], "search": search, "storage": "postgresql://db.example.org/optuna"}
    file = exported(copied, fields, tmp_path / "tiny.zip")
    registered_there = (copied.study("tiny") / "study.json").read_bytes()
    members = members_of(file)
    assert not any(b"example.org" in content for content in members.values())
    if whose == "made by hand":
        file = rewritten(members | {"study.json": registered_there}, tmp_path / "crafted.zip")
    assert len(imported(file, here).added) == 2
    taken = json.loads((here.study("tiny") / "study.json").read_bytes())
    there_then = json.loads(registered_there)
    del there_then["study"]["tracking"]["uri"], there_then["study"]["tune"]["storage"]
    assert taken == there_then


def test_an_imported_study_gives_its_points_its_curve_and_its_runs_in_mlflow_without_its_corpus(
    tmp_path: Path, here: Root, tiny_corpus: Path, empty_store: Path, ssmscale: Command
) -> None:
    corpus, away = tmp_path / "corpus", Root(tmp_path / "away")
    for root in (here, away):
        root.path.mkdir()
        shutil.copy(empty_store, root.path)
    shutil.copytree(tiny_corpus, corpus)
    fields = tiny_study(corpus)
    fields["grid"] |= {
        "sizes": {f"d{d}": {"n_blocks": 1, "d_model": d} for d in (8, 16, 32)},
        "iterations": [5, 10, 20],
    }
    train(away, fields)
    file = exported(away, fields, tmp_path / "tiny.zip")
    expected = ssmscale("points", "tiny", "--root", away.path).out
    shutil.rmtree(corpus)
    answer = ssmscale("import", file)
    assert (answer.status, "9 runs imported" in answer.out) == (0, True), answer.err
    assert ssmscale("points", "tiny").out == expected
    fitted = ssmscale("fit", "tiny", "--json").document
    assert fitted["architectures"]["prefix_simba"]["n_points"] == 9
    assert "9 finished runs" in ssmscale("sync", "tiny").out
    assert ssmscale("status", "tiny", "--json").document["counts"] == {"done": 9}
    planned = ssmscale("plan", "tiny")
    assert (planned.status, "corpus_elsewhere" in planned.out) == (0, True)


def test_importing_twice_changes_nothing(bundle: Path, here: Root, ssmscale: Command) -> None:
    assert "2 runs imported, 0 finished here already" in ssmscale("import", bundle).out
    before = hashes(here.path)
    assert "0 runs imported, 2 finished here already" in ssmscale("import", bundle).out
    assert hashes(here.path) == before


def test_half_a_study_imported_and_the_rest_trained_is_the_whole(
    here: Root, study_fields: Fields, bundle: Path, ssmscale: Command, write_study: Write, tmp_path: Path
) -> None:
    whole = with_iterations(study_fields, 5, 10, 20)
    ssmscale("import", bundle)
    planned = ssmscale("plan", write_study(whole), "--json").document
    assert [run["state"] for run in planned["runs"]].count("done") == 2
    train(here, whole)
    apart = Root(tmp_path / "apart")
    train(apart, whole)
    assert losses(here, whole) == losses(apart, whole)
    points = points_in(exported(here, whole, tmp_path / "here.zip"))
    assert points == points_in(exported(apart, whole, tmp_path / "apart.zip"))
    assert len(points) == 1 + 3


def test_bundles_that_overlap_duplicate_nothing(
    copied: Root, bundle: Path, here: Root, fields: Fields, tmp_path: Path
) -> None:
    longer = with_iterations(fields, 5, 10, 20)
    train(copied, longer)
    second = exported(copied, longer, tmp_path / "second.zip")
    imported(bundle, here)
    done = imported(second, here)
    assert (len(done.added), len(done.present)) == (1, 2)
    assert any("does not list 1 of these" in note for note in done.notes)
    folder = next((here.path / "series").iterdir())
    assert attempts(folder) == attempts(copied.series(folder.name)) == [1, 2]
    assert all(attempts(run) == [1] for run in (here.path / "runs").iterdir())
    other_way = Root(tmp_path / "other")
    imported(second, other_way)
    imported(bundle, other_way)
    assert attempts(other_way.series(folder.name)) == [1, 2]
    assert len(points_in(exported(other_way, longer, tmp_path / "third.zip"))) == 1 + 3


def test_of_two_copies_of_an_attempt_the_longer_stays(bundle: Path, here: Root) -> None:
    imported(bundle, here)
    folder = next((here.path / "series").iterdir())
    (run_dir,) = [run for run in (here.path / "runs").iterdir() if read_progress(run).step == 10]
    journals = folder / "journal" / "0001.jsonl", run_dir / "journal" / "0001.jsonl"
    whole = [path.read_bytes() for path in journals]
    for path, content in zip(journals, whole, strict=True):
        # As an import during the attempt would have left it.
        path.write_bytes(content[: content.index(b"\n") + 30])
    assert len(imported(bundle, here).added) == 1
    assert [path.read_bytes() for path in journals] == whole
    assert (attempts(folder), attempts(run_dir)) == ([1], [1])


def test_a_bundle_finishes_a_series_that_began_here(bundle: Path, here: Root, fields: Fields) -> None:
    train(here, fields, StopAfter(7))  # the run of 5 is done, the trunk is at 7
    before = hashes(here.path)
    done = imported(bundle, here)
    assert (len(done.added), len(done.present)) == (1, 1)
    after = hashes(here.path)
    assert {name: after[name] for name in before} == before
    folder = next((here.path / "series").iterdir())
    assert attempts(folder) == [1, 2]
    assert losses(here, fields)
    assert train(here, fields) == ["finished"]  # and there is nothing left to train
    assert attempts(folder) == [1, 2]


def test_a_series_in_training_is_neither_fenced_nor_half_imported(
    bundle: Path, here: Root, fields: Fields, ssmscale: Command
) -> None:
    ((_, runs),) = prepared(here, fields)
    folder = here.series(runs[0].series_id)
    with FileLock(folder / "lock"), Journal.open(folder) as journal:
        journal.append(Event.STARTED)
        before = hashes(here.path)
        answer = ssmscale("import", bundle)
        assert answer.status == 1
        assert f"series {folder.name} is in training here" in answer.out
        assert hashes(here.path) == before
        journal.append(Event.STEP, step=1, loss=4.0)  # not fenced
    assert "2 runs imported" in ssmscale("import", bundle).out


def test_a_name_taken_by_another_study_keeps_that_study(
    bundle: Path, here: Root, study_fields: Fields, ssmscale: Command
) -> None:
    registered(here, with_iterations(study_fields, 7))
    held = (here.study("tiny") / "study.json").read_bytes()
    answer = ssmscale("import", bundle)
    assert (answer.status, "does not list 2 of these runs" in answer.out) == (0, True)
    assert (here.study("tiny") / "study.json").read_bytes() == held


def test_a_torn_or_damaged_line_stays_behind_when_a_study_is_exported(
    there: Path, copied: Root, here: Root, fields: Fields, tmp_path: Path
) -> None:
    journal = next((copied.path / "series").iterdir()) / "journal" / "0001.jsonl"
    first, *rest = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([first, b"\xff\r\x00 damaged\n", *rest, b'{"t": 1, "ev']))
    imported(exported(copied, fields, tmp_path / "tiny.zip"), here)
    (copy_here,) = (here.path / "series").glob("*/journal/0001.jsonl")
    assert copy_here.read_bytes() == b"".join([first, *rest])
    assert losses(here, fields) == losses(Root(there), fields)


def test_an_export_without_a_finished_run_or_a_place_for_it_is_refused(
    study_fields: Fields, here: Root, write_study: Write, ssmscale: Command
) -> None:
    study = write_study(study_fields)
    for arguments, said in (
        ((study, "--out", "x.tar"), "does not end in .zip"),
        ((study, "--out", "nowhere/x.zip"), "there is no folder nowhere"),
        ((study, "--out", "x.zip"), "was never submitted"),
    ):
        ssmscale("export", *arguments).assert_refused(said)
    for point in registered(here, study_fields).points:
        write_run(here, point.run)
        write_series(here, point.run)
    ssmscale("export", study, "--out", "x.zip").assert_refused("none of its runs has finished")
