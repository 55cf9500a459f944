"""The doctor tries things, and says what to do about those that do not work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.cli.doctor import examine
from harness.doctor.machine import Finding, _kernels
from ssmttm.model import kernels
from tests.conftest import Command


def test_what_the_tests_run_on_is_found_to_work(ssmscale: Command) -> None:
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
        "packages for ray",
        "Ray's dashboard",
    ):
        assert checks[name]["works"], checks[name]


def test_a_place_that_cannot_be_written_is_named_with_a_remedy(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    (finding,) = [finding for finding in examine(blocked / "runs") if finding.name == "root"]
    assert not finding.works
    assert finding.remedy is not None


@pytest.mark.parametrize("word", ["python", "hardware"])
def test_the_table_names_every_check(ssmscale: Command, word: str) -> None:
    assert word in ssmscale("doctor").out


def kernels_line() -> Finding:
    kernels.chosen.cache_clear()
    try:
        return _kernels()
    finally:
        kernels.chosen.cache_clear()


def test_on_a_gpu_without_kernels_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    if kernels.load("cuda").scan is not None:
        pytest.skip("mamba-ssm is installed")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    finding = kernels_line()
    assert (finding.works, finding.found) == (False, "mixers by torch: mamba-ssm is not installed")
    assert finding.remedy is not None
    monkeypatch.setenv("SSMSCALE_KERNELS", "torch")
    assert (kernels_line().works, kernels_line().found) == (
        True,
        "mixers by torch: SSMSCALE_KERNELS is torch",
    )
    monkeypatch.setenv("SSMSCALE_KERNELS", "quick")
    assert (kernels_line().works, kernels_line().remedy) == (False, "unset SSMSCALE_KERNELS")


def test_without_a_gpu_no_kernels_are_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert (kernels_line().works, kernels_line().found) == (True, "mixers by torch: no CUDA device")
