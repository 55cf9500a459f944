"""A record of the code restores that code, and a copy of the code is exactly that code."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from harness.record.provenance import (
    LARGEST_FILE,
    PACKAGES,
    CodeRecord,
    code_state,
    running_code,
    source_files,
)
from tests.checkouts import git, make_checkout, python

RECORD = "import sys; from pathlib import Path; from harness.record.provenance import record_code; "
RECORD += "print(record_code(Path(sys.argv[1])))"
COPY = """
import sys
from pathlib import Path
from harness.dispatch.slurm.snapshot import check_copying, copy_code
from harness.record.provenance import record_code
from ssmttm.errors import InputError
study = Path(sys.argv[1])
try:
    check_copying(study)
    print(copy_code(study, record_code(study)))
except InputError as error:
    print(f"error: {error}")
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return make_checkout(tmp_path / "a checkout")


@pytest.fixture
def edited(checkout: Path) -> Path:
    """A checkout with every kind of change to its sources."""
    (checkout / "harness" / "cli" / "serve.py").write_text("# ünïcode, and no newline at the end")
    (checkout / "harness" / "cli" / "tune.py").unlink()
    git(checkout, "rm", "--quiet", "harness/plan/estimate.py")
    (checkout / "harness" / "staged.py").write_text("staged = 1\n")
    git(checkout, "add", "harness/staged.py")
    (checkout / "ssmttm" / "neuer_größe.py").write_text("new = 1\n")
    (checkout / "harness" / "notes.txt").write_text("password: hunter2\n")
    (checkout / "secrets.py").write_text("password = 'hunter2'\n")
    return checkout


def record_of(checkout: Path, study: Path) -> CodeRecord:
    state = python(checkout, RECORD, study)
    return CodeRecord.model_validate_json((study / "code" / f"{state}.json").read_bytes())


def test_the_commit_and_the_difference_restore_the_code_and_the_users_index_stays(
    edited: Path, tmp_path: Path
) -> None:
    before = git(edited, "status", "--porcelain")
    record = record_of(edited, tmp_path / "study")
    assert git(edited, "status", "--porcelain") == before
    assert record.commit == git(edited, "rev-parse", "HEAD")
    assert record.left_out == {}
    again = tmp_path / "again"
    git(tmp_path, "clone", "--quiet", str(edited), str(again))
    git(again, "apply", str(tmp_path / "study" / "code" / str(record.diff)))
    assert code_state(source_files(again)) == record.state
    assert source_files(again) == record.sources
    assert "hunter2" not in (tmp_path / "study" / "code" / str(record.diff)).read_text()


def test_the_same_code_is_recorded_once(checkout: Path, tmp_path: Path) -> None:
    study = tmp_path / "study"
    first = record_of(checkout, study)
    assert first.diff is None
    source = checkout / "harness" / "cli" / "serve.py"
    kept = source.read_bytes()
    source.write_bytes(kept + b"# more\n")
    second = record_of(checkout, study)
    source.write_bytes(kept)
    assert record_of(checkout, study) == first
    names = {path.name for path in (study / "code").iterdir()}
    assert names == {f"{first.state}.json", f"{second.state}.json", f"{second.state}.diff"}


def test_large_binary_and_ignored_files_are_named_and_not_recorded(checkout: Path, tmp_path: Path) -> None:
    (checkout / "harness" / "big.py").write_text("x = 1\n" * LARGEST_FILE)
    (checkout / "harness" / "odd.py").write_bytes(b"# \0\0\0\n")
    (checkout / "harness" / "made.py").write_text("made = 1\n")
    (checkout / "harness" / "cli" / "serve.py").write_text("# changed\n")
    record = record_of(checkout, tmp_path / "study")
    assert {name: why.split()[0] for name, why in record.left_out.items()} == {
        "harness/big.py": "larger",
        "harness/odd.py": "binary",
        "harness/made.py": "ignored",
    }
    diff = (tmp_path / "study" / "code" / str(record.diff)).read_text()
    assert len(diff) < 100_000
    assert "harness/cli/serve.py" in diff
    assert set(record.left_out) < set(record.sources)


def test_an_installed_package_is_its_version_and_its_files_even_inside_a_repository(
    checkout: Path, tmp_path: Path
) -> None:
    site = tmp_path / "project" / "site-packages"
    for package in PACKAGES:
        shutil.copytree(checkout / package, site / package)
    git(tmp_path, "init", "--quiet", str(tmp_path / "project"))
    (tmp_path / "project" / "readme").write_text("another project")
    git(tmp_path / "project", "add", "--all")
    git(tmp_path / "project", "commit", "--quiet", "--message", "x")
    record = record_of(site, tmp_path / "study")
    assert (record.commit, record.diff, record.left_out) == (None, None, {})
    assert record.version is not None
    assert record.state == code_state(source_files(checkout))
    assert python(site, COPY, tmp_path / "study").startswith("error: --snapshot:")


def test_a_copy_is_the_code_as_it_was_made_once_and_refused_if_it_was_changed(
    edited: Path, tmp_path: Path
) -> None:
    (edited / "harness" / "made.py").write_text("made = 1\n")
    study = tmp_path / "study"
    copy = Path(python(edited, COPY, study))
    assert copy.parent == study / "code"
    assert source_files(copy) == source_files(edited)
    assert not (copy / "secrets.py").exists()
    assert not list(study.glob("code/.*"))
    marked = copy / "unchanged"
    marked.touch()
    assert Path(python(edited, COPY, study)) == copy
    assert marked.exists()
    (edited / "harness" / "cli" / "serve.py").write_text("# edited again\n")
    other = Path(python(edited, COPY, study))
    assert other != copy
    assert source_files(copy) != source_files(other) == source_files(edited)
    (other / "harness" / "cli" / "serve.py").write_text("# changed\n")
    said = python(edited, COPY, study)
    assert said.startswith("error: ")
    assert str(other) in said


def test_an_error_names_the_reason_why_no_copy_can_be_made(checkout: Path, tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "git").symlink_to(str(shutil.which("git")))
    assert "rsync" in python(checkout, COPY, tmp_path / "study", PATH=str(programs))
    assert "':'" in python(checkout, COPY, tmp_path / "a:b")
    assert not list(tmp_path.rglob("*.json"))


def test_an_editors_files_another_place_and_another_time_change_no_state(
    checkout: Path, tmp_path: Path
) -> None:
    before = source_files(checkout)
    (checkout / "harness" / ".#worker.py").symlink_to("user@host.1234:5678")
    (checkout / "harness" / "nowhere.py").symlink_to("removed.py")
    (checkout / "harness" / ".worker.py").write_text("half = ")
    (checkout / "harness" / "folder.py").mkdir()
    assert source_files(checkout) == before
    assert record_of(checkout, tmp_path / "study").sources == before
    moved = tmp_path / "moved"
    shutil.copytree(checkout, moved, symlinks=True)
    for path in moved.rglob("*.py"):
        if path.is_file():
            path.touch()
    assert list(source_files(moved).items()) == list(before.items())


def test_a_process_whose_code_cannot_be_read_does_not_know_its_state(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> Any:
        raise PermissionError

    running_code.cache_clear()
    monkeypatch.setattr(Path, "open", refused)
    assert running_code() is None
    running_code.cache_clear()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a file away")
def test_the_commit_of_another_users_checkout_is_recorded_and_git_refusing_it_is_said(checkout: Path) -> None:
    head = git(checkout, "rev-parse", "HEAD")
    for path in (checkout, checkout / ".git"):
        os.chown(path, 4242, 4242)
    program = (
        "from harness.record.provenance import commit; from harness.doctor.machine import _what_git_records; "
    )
    said = python(checkout, program + "print(commit()); print(_what_git_records())").splitlines()
    assert said[0] == head
    assert "the commit of the code is recorded, though git refuses its checkout" in said[1]
    assert "dubious ownership" in said[1]
