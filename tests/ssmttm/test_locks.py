"""Locks hold between processes on every file system, and everyone sees who may go on."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import Timeout

from ssmttm import locks
from ssmttm.locks import file_lock, is_held
from tests.waiting import wait_until

HOLD = """
import sys, time
from pathlib import Path
from ssmttm import locks
if sys.argv[2] == "none":
    locks._shared_lock = lambda path: "none"
    locks.LEASE_SECONDS = 2.0
with locks.file_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(params=["locks", "none"])
def holder(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock of a file, on a file system with locks or without any."""
    monkeypatch.setattr(locks, "_KNOWN", {})
    if request.param == "none":
        monkeypatch.setattr(locks, "_shared_lock", lambda _: "none")
        monkeypatch.setattr(locks, "LEASE_SECONDS", 2.0)
    command = [sys.executable, "-c", HOLD, str(tmp_path / "lock"), request.param]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_lock_is_held_while_its_holder_lives_and_no_longer(
    holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    path = tmp_path / "lock"
    assert is_held(path)
    with pytest.raises(Timeout), file_lock(path, wait=False):
        pass
    holder.kill()
    holder.wait()
    wait_until(lambda: not is_held(path))
    with file_lock(path, wait=False):
        assert is_held(path)
    assert not is_held(path)


def test_one_look_at_a_lock_keeps_no_process_from_it(tmp_path: Path) -> None:
    with file_lock(tmp_path / "lock"):
        pass
    for _ in range(3):
        assert not is_held(tmp_path / "lock")
        with file_lock(tmp_path / "lock", wait=False):
            pass


def test_an_error_that_is_not_the_lack_of_locks_is_not_taken_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(locks, "_KNOWN", {})
    monkeypatch.setattr(locks.fcntl, "flock", fail)
    with pytest.raises(OSError, match="Input/output error"):
        file_lock(tmp_path / "lock")
