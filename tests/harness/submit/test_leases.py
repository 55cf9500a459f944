"""Leases on a Series: one at a time, and removed only by a process that has read it."""

from pathlib import Path

from harness.submit.leases import DAMAGED, Lease, acquire, read_lease, release


def lease(array: str) -> Lease:
    return Lease(study="s", array=array, process={"host": "h", "pid": 1}, t=1.0)


def test_the_first_lease_holds(tmp_path: Path) -> None:
    assert acquire(tmp_path, lease("a"))
    assert not acquire(tmp_path, lease("b"))
    assert read_lease(tmp_path / "claim.json") == lease("a")


def test_a_lease_that_is_over_makes_room_for_the_next(tmp_path: Path) -> None:
    acquire(tmp_path, lease("a"))
    release(tmp_path, lease("a"))
    assert read_lease(tmp_path / "claim.json") is None
    assert acquire(tmp_path, lease("b"))


def test_a_lease_made_meanwhile_is_given_back(tmp_path: Path) -> None:
    acquire(tmp_path, lease("b"))
    release(tmp_path, lease("a"))  # judged when a's was there
    assert read_lease(tmp_path / "claim.json") == lease("b")


def test_a_damaged_lease_holds_nothing_and_can_be_released(tmp_path: Path) -> None:
    (tmp_path / "claim.json").write_text('{"study": 5')
    assert read_lease(tmp_path / "claim.json") == DAMAGED
    release(tmp_path, DAMAGED)
    assert acquire(tmp_path, lease("a"))


def test_nothing_else_is_left_in_the_directory(tmp_path: Path) -> None:
    acquire(tmp_path, lease("a"))
    acquire(tmp_path, lease("b"))
    release(tmp_path, lease("c"))
    assert [path.name for path in tmp_path.iterdir()] == ["claim.json"]
