"""Claims on a Series: one at a time, and taken away only from who holds it."""

from pathlib import Path

from harness.submit.claims import NOBODYS, Claim, drop_claim, make_claim, read_claim


def claim(array: str) -> Claim:
    return Claim(study="s", array=array, process={"host": "h", "pid": 1}, t=1.0)


def test_the_first_claim_holds(tmp_path: Path) -> None:
    assert make_claim(tmp_path, claim("a"))
    assert not make_claim(tmp_path, claim("b"))
    assert read_claim(tmp_path) == claim("a")


def test_a_claim_that_is_over_makes_room_for_the_next(tmp_path: Path) -> None:
    make_claim(tmp_path, claim("a"))
    drop_claim(tmp_path, claim("a"))
    assert read_claim(tmp_path) is None
    assert make_claim(tmp_path, claim("b"))


def test_a_claim_made_meanwhile_is_given_back(tmp_path: Path) -> None:
    make_claim(tmp_path, claim("b"))
    drop_claim(tmp_path, claim("a"))  # judged when a's was there
    assert read_claim(tmp_path) == claim("b")


def test_a_damaged_claim_is_nobodys_and_can_be_dropped(tmp_path: Path) -> None:
    (tmp_path / "claim.json").write_text('{"study": 5')
    assert read_claim(tmp_path) == NOBODYS
    drop_claim(tmp_path, NOBODYS)
    assert make_claim(tmp_path, claim("a"))


def test_nothing_else_is_left_in_the_directory(tmp_path: Path) -> None:
    make_claim(tmp_path, claim("a"))
    make_claim(tmp_path, claim("b"))
    drop_claim(tmp_path, claim("c"))
    assert [path.name for path in tmp_path.iterdir()] == ["claim.json"]
