"""The doctor tries things, and says what to do about those that do not work."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.doctor import examine
from tests.conftest import Answer


def test_what_the_tests_run_on_is_found_to_work(ssmscale: Callable[..., Answer]) -> None:
    answer = ssmscale("doctor", "--json")
    checks = {check["name"]: check for check in json.loads(answer.out)["checks"]}
    assert answer.status == 0
    for name in (
        "python",
        "root",
        "packages for train",
        "packages for analysis",
        "torch device",
        "soundfont",
    ):
        assert checks[name]["works"], checks[name]


def test_a_place_that_cannot_be_written_is_named_with_a_remedy(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    (finding,) = [finding for finding in examine(blocked / "runs") if finding.name == "root"]
    assert not finding.works
    assert finding.remedy is not None


@pytest.mark.parametrize("word", ["python", "hardware"])
def test_the_table_names_every_check(ssmscale: Callable[..., Answer], word: str) -> None:
    assert word in ssmscale("doctor").out
