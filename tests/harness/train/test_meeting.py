"""Ranks meet where no other user can join them."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import psutil
import pytest

from harness.train import meeting
from harness.train.meeting import make_meeting, meet
from ssmttm.errors import InputError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

WORLD = 3
STRANGER = 65534
"""A user without files."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "lo")  # put back after the test, in which ranks of this process set it
        monkeypatch.delenv(name)
    make_meeting(tmp_path / "meeting")
    return tmp_path / "meeting"


def stores_of_all(folder: Path) -> Sequence[Store]:
    """Return the store of each rank, after each has told its own number there."""
    with ThreadPoolExecutor(WORLD) as pool:
        stores = list(pool.map(lambda rank: meet(folder, rank, WORLD), range(WORLD)))
    for rank, store in enumerate(stores):
        store.set(f"rank {rank}", str(rank))
    return stores


def assert_all_see_all(stores: Sequence[Store]) -> None:
    for store in stores:
        assert [store.get(f"rank {rank}") for rank in range(WORLD)] == [b"0", b"1", b"2"]


def listening() -> set[str]:
    """Return the addresses this process listens on."""
    return {
        connection.laddr.ip
        for connection in psutil.Process().net_connections()
        if connection.status == psutil.CONN_LISTEN
    }


def test_ranks_meet_through_a_file_and_listen_nowhere(folder: Path) -> None:
    before = listening()
    assert_all_see_all(stores_of_all(folder))
    assert listening() == before
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("lo", "=lo")


def test_the_interface_that_the_site_names_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    stores_of_all(folder)
    assert os.environ["NCCL_SOCKET_IFNAME"] == "ib0"


def test_without_locks_a_stranger_at_the_first_ranks_port_finds_and_changes_nothing_by_its_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._C._distributed_c10d import TCPStore

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(meeting.fcntl, "flock", no_locks)
    stores = stores_of_all(folder)
    place = meeting._Place.model_validate_json((folder / "place.json").read_bytes())
    assert place.host == "127.0.0.1"
    assert "0.0.0.0" not in listening()
    stranger = TCPStore(place.host, place.port, is_master=False)
    assert not stranger.check(["rank 0"])
    stranger.set("rank 0", "mine")
    assert_all_see_all(stores)


def test_a_folder_that_others_can_enter_is_refused(folder: Path) -> None:
    folder.chmod(0o750)
    with pytest.raises(InputError, match=r"meeting: other users can enter it"):
        meet(folder, 0, WORLD)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_cannot_read_what_ranks_tell_each_other() -> None:
    with TemporaryDirectory() as root:  # pytest's own folders are closed to others
        Path(root).chmod(0o755)
        make_meeting(folder := Path(root) / "meeting")
        stores_of_all(folder)
        stranger = subprocess.run(  # noqa: PLW1510
            ["cat", root, folder / "store"], user=STRANGER, extra_groups=[], capture_output=True, text=True
        )
    assert f"{root}: Is a directory" in stranger.stderr
    assert f"{folder / 'store'}: Permission denied" in stranger.stderr
