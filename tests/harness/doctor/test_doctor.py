"""The doctor tries what a study needs, and gives a remedy for each thing that does not work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from harness.doctor import machine
from harness.doctor.machine import Finding, _kernels, _locks, _writable
from ssmttm import locks
from ssmttm.model import kernels
from tests.conftest import REPOSITORY, Command


def test_all_that_the_tests_need_is_found_to_work(ssmscale: Command) -> None:
    checks = {check["name"]: check for check in ssmscale("doctor", "--json").document["checks"]}
    packages = [f"packages for {name}" for name in ("train", "analysis", "ray")]
    for name in ("python", "root", *packages, "torch device", "soundfont", "Ray's dashboard"):
        assert checks[name]["works"], checks[name]
    table = ssmscale("doctor").out
    assert all(f"{name}: " in table for name in checks)


def test_a_folder_that_cannot_be_written_is_named_with_a_remedy(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    finding = _writable(blocked / "runs")
    assert not finding.works
    assert finding.remedy is not None


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
    assert str(finding.remedy).startswith(f"in the checkout: sh .ci/kernels {sys.executable}")
    assert (REPOSITORY / ".ci" / "kernels").is_file()


def test_kernels_are_not_installed_beside_a_torch_without_cuda() -> None:
    if torch.version.cuda is not None:
        pytest.skip("this torch is built with CUDA")
    command = ["sh", str(REPOSITORY / ".ci" / "kernels"), sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert (
        done.stderr.strip() == f"torch {torch.__version__} is built without CUDA: install one with it first"
    )


@pytest.mark.parametrize(
    ("variable", "works", "found", "remedy"),
    [
        ("torch", True, "mixers by torch: SSMSCALE_KERNELS is torch", None),
        ("quick", False, "SSMSCALE_KERNELS: 'quick': must be torch", "unset SSMSCALE_KERNELS"),
        (None, True, "mixers by torch: no CUDA device", None),
    ],
)
def test_only_a_wrong_choice_of_kernels_needs_a_remedy(
    monkeypatch: pytest.MonkeyPatch, variable: str | None, works: bool, found: str, remedy: str | None
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: variable is not None)
    monkeypatch.delenv("SSMSCALE_KERNELS", raising=False)
    if variable is not None:
        monkeypatch.setenv("SSMSCALE_KERNELS", variable)
    finding = kernels_line()
    assert (finding.works, finding.remedy) == (works, remedy)
    assert finding.found.startswith(found)


def test_a_root_without_locks_is_said_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _locks(tmp_path / "runs").works
    monkeypatch.setattr(locks, "_KNOWN", {tmp_path.stat().st_dev: False})
    finding = _locks(tmp_path / "runs")
    assert not finding.works
    assert "leases replace them" in finding.found
    assert "-o flock" in str(finding.remedy)


def test_a_package_that_ray_lacks_is_named_by_the_process_that_tries_it_beside_torch() -> None:
    finding = machine._ray_dashboard(machine._start_import("no_such_package"))
    assert finding.found == "ModuleNotFoundError: No module named 'no_such_package'"
    assert finding.remedy is not None


def test_the_doctor_waits_for_no_second_import_in_its_own_process(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from harness.doctor.machine import examine_machine
assert all(finding.works for finding in examine_machine(Path({str(tmp_path)!r})) if "Ray" in finding.name)
print("torch" in sys.modules, "ray" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]
