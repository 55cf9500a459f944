"""A damaged or forged bundle is refused with file, member and reason, and nothing is written."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.record.root import Root
from tests.conftest import Command
from tests.harness.bundles import Members, members_of, rewritten
from tests.harness.fuzzing import hashes
from tests.harness.trainer import prepared
from tests.studies import Fields


def change(name: str, content: bytes) -> Callable[[Members], Members]:
    return lambda members: members | {next(key for key in members if key.endswith(name)): content}


def edited(name: str, old: bytes, new: bytes) -> Callable[[Members], Members]:
    def apply(members: Members) -> Members:
        key = next(key for key in sorted(members) if key.endswith(name) and old in members[key])
        return members | {key: members[key].replace(old, new, 1)}

    return apply


def without(name: str) -> Callable[[Members], Members]:
    def apply(members: Members) -> Members:
        gone = next(key for key in sorted(members) if key.endswith(name))
        return {key: content for key, content in members.items() if key != gone}

    return apply


def added(name: str, content: bytes = b"x") -> Callable[[Members], Members]:
    return lambda members: members | {name: content}


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (added("../evil.json"), ["'../evil.json'", "is not the name of"]),
        (added("/etc/evil"), ["'/etc/evil'", "is not the name of"]),
        (added("runs/0123456789ab/checkpoints/model.pt"), ["model.pt", "is not the name of"]),
        (added("runs/"), ["'runs/'", "is not the name of"]),
        (edited("run.json", b'"batch": 8', b'"batch": 9'), ["run.json", "holds run"]),
        (edited("run.json", b'"batch": 8', b'"batch": "x"'), ["run.json", "batch"]),
        (edited("series.json", b'"batch": 8', b'"batch": 9'), ["series.json", "is not the series of run"]),
        (change("series.json", b"[" * 100_000), ["series.json", "is not"]),
        (without("series.json"), ["series.json", "missing"]),
        (edited("0001.jsonl", b'"event": "finished"', b'"event": "resumed"'), ["runs/", "finished"]),
        (edited("0001.jsonl", b'"loss": ', b'"loss": "'), ["0001.jsonl", "line"]),
        (edited("0001.jsonl", b'"step": 5, "tokens"', b'"step": 4, "tokens"'), ["journal", "step 4 of 5"]),
        (change("study.json", b"{}"), ["study.json", "study"]),
        (edited("study.json", b'"tiny"', b'"other"'), ["study.json", "'other'"]),
        (edited("study.json", b"10\n", b"11\n"), ["run.json", "is not a run of the study"]),
        (added("calibration.json", b"[]"), ["calibration.json"]),
        (added("series/0123456789ab/series.json", b"{}"), ["0123456789ab", "none of the bundle's runs"]),
        (added("study.json\0.pyc"), ["study.json"]),
    ],
)
def test_a_damaged_or_forged_bundle_is_refused_and_nothing_is_written(
    bundle: Path,
    here: Root,
    tmp_path: Path,
    ssmscale: Command,
    spoil: Callable[[Members], Members],
    said: list[str],
) -> None:
    bad = rewritten(spoil(members_of(bundle)), tmp_path / "bad.zip")
    answer = ssmscale("import", bad)
    answer.assert_refused("bad.zip", *said)
    assert "ssmscale-bundle-" not in answer.err  # the temporary folder is not named
    assert not here.path.exists()


@pytest.mark.parametrize(
    ("listed", "said"),
    [
        ({"format": 2}, ["format: 2", "reads only format 1"]),
        ({"format": "x"}, ["format"]),
        ({"study": "../up"}, ["'tiny'"]),
        ({"counts": {"runs": 2, "series": 1, "journals": 3, "evaluations": 1}}, ["counts"]),
        ({"counts": {"runs": 3, "series": 1, "journals": 3}}, ["counts"]),
        ({"members": {}}, ["is not listed in bundle.json"]),
        ({"members": {"runs/x": {"bytes": 1, "sha256": "y"}}}, ["members.runs/x.sha256"]),
    ],
)
def test_a_list_of_contents_that_is_wrong_is_refused(
    bundle: Path, here: Root, tmp_path: Path, ssmscale: Command, listed: Fields, said: list[str]
) -> None:
    bad = rewritten(members_of(bundle), tmp_path / "bad.zip", listed)
    ssmscale("import", bad).assert_refused("bad.zip", *said)
    assert not here.path.exists()


def test_a_member_changed_after_it_was_listed_is_refused(
    bundle: Path, tmp_path: Path, ssmscale: Command
) -> None:
    members = members_of(bundle)
    name = next(name for name in members if name.endswith("run.json"))
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        for key, content in members.items():
            archive.writestr(key, content + b" " if key == name else content)
    ssmscale("import", tmp_path / "bad.zip").assert_refused(name, "checksum")


def test_links_doubles_bombs_and_torn_archives_are_refused(
    bundle: Path, here: Root, tmp_path: Path, ssmscale: Command
) -> None:
    def refused(said: str) -> None:
        ssmscale("import", tmp_path / "bad.zip").assert_refused(said, "bad.zip")
        assert not here.path.exists()

    members, bad = members_of(bundle), tmp_path / "bad.zip"
    with zipfile.ZipFile(bad, "w") as archive:
        link = zipfile.ZipInfo("study.json")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    refused("is not a plain file")
    with zipfile.ZipFile(bad, "w") as archive:
        archive.writestr("study.json", members["study.json"])
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("study.json", members["study.json"])
    refused("occurs twice")
    rewritten(members | {"points.csv": bytes(2**26)}, bad)
    refused("would unpack to")
    bad.write_bytes(bundle.read_bytes()[:-100])
    refused("is not a complete zip archive")
    bad.write_bytes(b"PK\x03\x04 not a zip")
    refused("is not a complete zip archive")
    bad.unlink()
    refused("bad.zip")


def test_a_damaged_run_here_stops_the_import_before_it_begins(
    bundle: Path, here: Root, fields: Fields, ssmscale: Command
) -> None:
    ((_, runs),) = prepared(here, fields)
    (here.run(runs[1].run_id) / "run.json").write_text("{}")
    before = hashes(here.path)
    ssmscale("import", bundle).assert_refused(runs[1].run_id)
    assert hashes(here.path) == before
