"""No message and no file shows the password of an address, wherever it stands there."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import quote_plus

import pytest

from harness.common.address import (
    has_password,
    lasting,
    login_of,
    redact,
    sqlite_address,
    sqlite_file,
    without_login,
    without_password,
)
from harness.common.validation import first_line
from harness.plan.cluster import load_profile
from harness.record.root import Root
from harness.study.schema import load_study
from tests.conftest import Command, Write
from tests.harness.journals import registered, write_finished
from tests.studies import Fields

PLACE = {"name": "place", "gpus": 0, "cores": 2, "memory_gib": 4, "partitions": ["cpu"]}
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


def test_a_login_is_read_as_it_was_quoted() -> None:
    assert login_of("http://me%40home:s3+cr%2Fet@host") == ("me@home", "s3+cr/et")
    assert login_of("http://host:5000") == (None, None)


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


@pytest.mark.parametrize(
    ("address", "file"),
    [
        ("sqlite:///runs.db", "here/runs.db"),
        ("sqlite:///a b/runs.db?timeout=9", "here/a b/runs.db"),
        ("sqlite+pysqlite:///~/runs.db", "home/runs.db"),
        ("sqlite:///a%3Fb%25.db", "here/a?b%.db"),
        (" sqlite:///100%.db", "here/100%.db"),
        ("sqlite://", None),
        ("sqlite:///:memory:", None),
        ("postgresql://db/runs?sslmode=require", None),
        ("http://host:5000/%7Eme", None),
    ],
)
def test_the_address_of_an_sqlite_file_lasts_and_names_the_file_that_sqlalchemy_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str, file: str | None
) -> None:
    from sqlalchemy import make_url

    for place in ("here", "home"):
        (tmp_path / place).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    lasts = lasting(address)
    monkeypatch.chdir(tmp_path)
    assert sqlite_file(lasts) == (tmp_path / file if file else None)
    assert lasting(lasts) == lasts == (lasts if file else address)
    if file:
        assert make_url(lasts).database == str(tmp_path / file)
        assert make_url(lasts).query == make_url(address.strip()).query
        assert sqlite_file(sqlite_address(tmp_path / file)) == tmp_path / file


def test_a_home_is_expanded_in_every_path_of_studies_profiles_and_options(
    tmp_path: Path,
    ssmscale: Command,
    study_fields: Fields,
    empty_store: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    home = tmp_path / "home"
    (home / "tracker").mkdir(parents=True)
    (home / "tracker" / "runs.db").write_bytes(empty_store.read_bytes())
    monkeypatch.setenv("HOME", str(home))
    (home / "corpus").symlink_to(study_fields["corpus"]["path"])
    study_fields |= {"root": "~/runs", "tracking": {"uri": "sqlite:///~/tracker/runs.db"}}
    study_fields["corpus"]["path"] = "~/corpus"
    (home / "study.yaml").write_text(json.dumps(study_fields))
    (home / "place.yaml").write_text(json.dumps({**PLACE, "shared": ["~"]}))
    answer = ssmscale("plan", "~/study.yaml", "--cluster", "~/place.yaml", "--json")
    assert answer.status == 0, answer.err
    assert load_profile("~/place.yaml").shared == (home,)
    loaded = load_study(home / "study.yaml")
    assert (loaded.root, loaded.corpus.path) == (home / "runs", home / "corpus")
    write_finished(Root(home / "runs"), registered(Root(home / "runs"), study_fields).points)
    monkeypatch.setenv("SSMSCALE_ROOT", "~/runs")
    for arguments in (("tiny",), ("tiny", "--root=~/runs")):
        synced = ssmscale("points", *arguments, "--out=~/points.csv")
        assert synced.status == 0, synced.err
    assert (home / "points.csv").exists()
    with closing(sqlite3.connect(home / "tracker" / "runs.db")) as database:
        assert database.execute("SELECT count(*) FROM runs").fetchone() == (4,)
    assert not (tmp_path / "~").exists()
