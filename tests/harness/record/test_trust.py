"""The files of other users decide neither what is executed nor where logins go."""

from __future__ import annotations

import os
import pwd
import socket
from pathlib import Path

import pytest

from harness.dispatch.arrays import ArrayStore, new_array, read_array
from harness.dispatch.ledger import open_ledger
from harness.dispatch.slurm.snapshot import copy_code
from harness.plan.allocation import Shape
from harness.record import trust
from harness.record.control import Control
from harness.record.registry import ResolvedStudy, check_before_training, registered
from harness.record.root import Root
from harness.record.trust import believe, doubt, read_settings, settings_path, with_login
from harness.submit.target import Options, last_options
from harness.tracking.store import tracking_uri
from harness.tracking.sync import replay
from ssmttm.errors import InputError
from tests.conftest import Command
from tests.harness.fuzzing import Planted
from tests.harness.journals import registered as register_fields
from tests.studies import Fields

SHAPE = Shape(nodes=1, ranks=1, threads=1, memory_gib=1.0)
STRANGER = pwd.getpwuid(65534).pw_name
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user without settings."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


def settle(text: str, mode: int = 0o600) -> Path:
    """Write the user's settings."""
    path = settings_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(mode)
    return path


def give_to_stranger(path: Path) -> None:
    os.chown(path, pwd.getpwnam(STRANGER).pw_uid, -1, follow_symlinks=False)


def plant_submission(resolved: ResolvedStudy, profile: Path) -> Path:
    """Record a last submission to a cluster whose profile has shell lines."""
    control = Control(resolved.root.control(resolved.study.name).path)
    control.append("submitted", runs=[], on="slurm", cluster=str(profile))
    return control.path


@as_root
def test_a_file_is_believed_if_its_owner_is_trusted(home: Path) -> None:
    file = home / "file"
    file.touch()
    assert doubt(file) is None
    give_to_stranger(file)
    assert doubt(file) == f"belongs to {STRANGER}"
    settle(f"trusted: [{STRANGER}]\n")
    assert doubt(file) is None
    link = home / "link"
    link.symlink_to(settings_path())
    settle("trusted: []\n")
    give_to_stranger(link)
    assert doubt(link) == f"belongs to {STRANGER}"


@as_root
def test_on_a_terminal_the_user_is_asked_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = home / "file"
    file.touch()
    give_to_stranger(file)
    asked: list[str] = []
    monkeypatch.setattr(trust, "_asked", lambda question: asked.append(question) or True)
    for _ in range(2):
        believe(file, "what is run", "do it")
    assert asked == [f"{file}: belongs to {STRANGER}, and says what is run. Trust {STRANGER} from now on"]
    assert read_settings().trusted == (STRANGER,)
    assert settings_path().stat().st_mode & 0o777 == 0o600


def test_a_file_that_others_may_write_is_not_believed(home: Path) -> None:
    file = home / "file"
    file.touch()
    file.chmod(0o666)
    with pytest.raises(
        InputError, match=r"can be written by every user, so it does not decide what is run; do it$"
    ):
        believe(file, "what is run", "do it")


def test_settings_that_others_may_read_are_refused(home: Path) -> None:
    path = settle("addresses: ['http://me:s3cret@host']\n", mode=0o644)
    with pytest.raises(InputError, match=f"{path}: other users may read or write it; .*chmod 600"):
        with_login("http://host")


def test_the_users_own_list_completes_an_address_with_its_login() -> None:
    settle("addresses: ['postgresql://me:s3cret@db:5432/optuna', 'http://host:5000']\n")
    assert with_login("postgresql://me@db:5432/optuna") == "postgresql://me:s3cret@db:5432/optuna"
    assert with_login("postgresql://db:5432/other") == "postgresql://db:5432/other"


@as_root
def test_retry_takes_no_profile_from_a_strangers_record(
    resolved: ResolvedStudy, ssmscale: Command, planted: Planted, home: Path
) -> None:
    profile = home / "theirs.yaml"
    profile.write_text(
        f"name: theirs\npartitions: [p]\ngpus: 0\ncores: 1\nmemory_gib: 1\nsetup: ['mkdir {planted.folder}']\n"
    )
    record = plant_submission(resolved, profile)
    assert last_options(resolved, Options()) is not None
    give_to_stranger(record)
    refused = ssmscale("retry", resolved.study.name, "--root", resolved.root.path)
    assert refused.status == 2
    assert f"{record}: belongs to {STRANGER}, so it does not decide where and how" in refused.err
    assert f"name '{STRANGER}' under `trusted` in {settings_path()}" in refused.err
    assert last_options(resolved, Options(on="slurm", cluster="h100x8")) is None
    planted.assert_not_executed()


@as_root
def test_a_strangers_study_is_read_and_neither_trained_nor_tuned_by_its_name(
    resolved: ResolvedStudy, ssmscale: Command
) -> None:
    name, root = resolved.study.name, resolved.root.path
    give_to_stranger(root / "studies" / name / "study.json")
    assert ssmscale("status", name, "--root", root).status == 0
    for verb, *options in (("submit", "--on", "local"), ("retry",), ("serve",)):
        refused = ssmscale(verb, name, "--root", root, *options)
        assert refused.status == 2
        assert f"study.json: belongs to {STRANGER}, so it does not decide what is trained" in refused.err
    with pytest.raises(InputError, match="submit the study's YAML file"):
        check_before_training(registered(name, root))


@as_root
def test_no_login_goes_to_a_tracker_that_a_stranger_names(
    home: Path, study_fields: Fields, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as theirs:
        theirs.setblocking(False)
        address = f"http://127.0.0.1:{theirs.getsockname()[1]}"
        study_fields["tracking"] = {"uri": address}
        resolved = register_fields(Root(home / "runs"), study_fields)
        assert tracking_uri(resolved.study, resolved.root) == address
        give_to_stranger(resolved.root.study("tiny") / "study.json")
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "s3cret")
        said = f"does not decide that runs are sent to {address}; set MLFLOW_TRACKING_URI"
        with pytest.raises(InputError, match=said):
            replay(registered("tiny", resolved.root.path), [])
        with pytest.raises(BlockingIOError):
            theirs.accept()


@as_root
def test_no_token_goes_to_a_ray_cluster_that_a_stranger_names(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as theirs:
        theirs.setblocking(False)
        address = f"http://127.0.0.1:{theirs.getsockname()[1]}"
        store = ArrayStore(home / "study")
        array = new_array("ssmscale-1", SHAPE, [], ray_address=address)
        store.write(array.model_copy(update={"job_id": "ssmscale-1"}))
        give_to_stranger(store.path_of(array))
        assert f"{address}: not asked, since" in str(open_ledger(home / "study").problem)
        with pytest.raises(BlockingIOError):
            theirs.accept()


@as_root
@pytest.mark.parametrize("planted", ["", "sitecustomize.py"])
def test_no_job_runs_from_a_copy_of_the_code_that_a_stranger_can_change(home: Path, planted: str) -> None:
    copy = home / "study" / "code" / "0123456789ab"
    copy.mkdir(parents=True)
    (copy / "sitecustomize.py").touch()
    give_to_stranger(copy / planted)
    with pytest.raises(
        InputError, match=f"belongs to {STRANGER}, so it does not decide the code that jobs run"
    ):
        copy_code(home / "study", copy.name)


def test_a_job_executes_the_array_that_was_submitted_and_no_other(home: Path) -> None:
    store = ArrayStore(home / "study")
    array = new_array("ssmscale-1", SHAPE, [])
    store.write(array.model_copy(update={"job_id": "7"}))  # known only after the submission
    path = store.path_of(array)
    assert read_array(path, array.digest).job_id == "7"
    store.write(array.model_copy(update={"shape": Shape(nodes=2, ranks=2, threads=1, memory_gib=1.0)}))
    with pytest.raises(InputError, match="was changed after this job was submitted"):
        read_array(path, array.digest)
    path.chmod(0o666)
    with pytest.raises(InputError, match="can be written by every user"):
        read_array(path, None)
