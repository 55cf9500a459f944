"""No message and no file shows the password of an address, wherever it stands there."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import quote_plus

import pytest

from harness.common.address import has_password, redact, without_login, without_password
from harness.common.validation import first_line
from harness.record.root import Root
from tests.conftest import Command, Write
from tests.harness.journals import registered
from tests.studies import Fields

ODBC = f"mssql+pyodbc:///?odbc_connect={quote_plus('DRIVER={ODBC};UID=sa;PWD={s3;cret};X=1')}"


@pytest.mark.parametrize(
    ("address", "shown", "kept"),
    [
        (
            "postgresql://me:s3cret@db:5432/runs",
            "postgresql://me:***@db:5432/runs",
            "postgresql://me@db:5432/runs",
        ),
        ("postgresql://me:s3/c@ret@db/runs", "postgresql://me:***@db/runs", "postgresql://me@db/runs"),
        (
            "mysql://db/x?user=me&password=s3cret&a=1",
            "mysql://db/x?user=me&password=***&a=1",
            "mysql://db/x?user=me&a=1",
        ),
        ("http://me:s3cret@host:5000/a", "http://me:***@host:5000/a", "http://me@host:5000/a"),
        (ODBC, "mssql+pyodbc:///?odbc_connect=***", ODBC.replace(quote_plus("PWD={s3;cret};"), "")),
        ("postgresql://me@db:5432/runs", None, None),
        ("http://host:5000/users/me@home", None, None),
        ("sqlite:////data/mlflow.db", None, None),
    ],
)
def test_an_address_is_shown_and_stored_without_its_password(
    address: str, shown: str | None, kept: str | None
) -> None:
    assert redact(address) == (shown or address)
    assert without_password(address) == (kept or address)
    assert has_password(address) == (kept is not None)
    assert "me" not in without_login("http://me:s3cret@host:5000/")


def test_passwords_vanish_within_any_text_and_nothing_else_does() -> None:
    told = OSError("API request to http://me:s3cret@host:5000/api failed; password = 's3cret'\nmore")
    assert first_line(told) == "API request to http://me:***@host:5000/api failed; password = ***"
    for plain in ("at 12:30 me@home wrote", 'MLFLOW_TRACKING_PASSWORD="$(cat /x)"', "loss=0.1: 3@4"):
        assert redact(plain) == plain


@pytest.mark.parametrize("key", ["tracking.uri", "tune.storage"])
def test_a_password_in_a_study_is_refused_with_a_place_for_it(
    write_study: Write, study_fields: Fields, ssmscale: Command, key: str
) -> None:
    study_fields["tune"] = {"sizes": ["xs"], "search": {"training.optimiser.lr": {"low": 1e-3, "high": 1e-2}}}
    study = write_study(study_fields)
    refused = ssmscale("plan", study, "--set", f"{key}=postgresql://me:s3cret@db/x")
    assert refused.status == 2
    assert f"--set: {key}: postgresql://me:***@db/x: holds a password" in refused.err
    assert "~/.pgpass" in refused.err


def test_the_doctor_finds_passwords_of_earlier_versions_and_leaves_them_out(
    tmp_path: Path, study_fields: Fields, ssmscale: Command
) -> None:
    root = Root(tmp_path / "runs")
    registered(root, study_fields | {"tracking": {"uri": "http://me:s3cret@tracker.example.org:5000"}})
    path, where = root.study("tiny") / "study.json", ("doctor", "--root", root.path)
    path.chmod(0o640)
    found = ssmscale(*where).out
    assert f"no  secrets: passwords in {path} -> leave them out: " in found
    assert f"ok  secrets: left the passwords out of {path}" in ssmscale(*where, "--fix").out
    assert json.loads(path.read_text())["study"]["tracking"]["uri"] == "http://me@tracker.example.org:5000"
    assert path.stat().st_mode & 0o777 == 0o640
    assert "ok  secrets: no file" in ssmscale(*where).out
