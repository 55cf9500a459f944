"""Findings of the doctor from answers of SLURM that the tests' own cluster does not give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness.common.validation import validate
from harness.doctor.machine import Finding
from harness.doctor.slurm import examine_slurm
from harness.plan.cluster import Profile
from tests.programs import write_program

GONE = 'echo "Unable to contact slurm controller" >&2; exit 1'
CONTROL = 'case "$1" in ping) echo up;; *) echo "MaxArraySize = 1001";; esac'
NODES = 'echo "CLUSTER: c"; echo "up|4|8|16000|(null)|4:00:00|idle"'


def examine(folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> dict[str, Finding]:
    """Check a profile against programs that give these answers; no other program is found."""
    programs = {"sinfo": NODES, "scontrol": changes.pop("scontrol", CONTROL)}
    for name, answer in programs.items():
        write_program(folder / name, answer)
    monkeypatch.setenv("PATH", str(folder))
    fields = {"name": "c", "partitions": ["low"], "gpus": 0, "cores": 8, "memory_gib": 8, **changes}
    return {found.name: found for found in examine_slurm(validate(Profile, fields, "test"))}


@pytest.mark.parametrize(
    ("changes", "asked"),
    [
        ({}, "24"),
        ({"limits": {"hours": 5}}, "5"),
        ({"partitions": {"low": {"hours": 6}}}, "6"),
        ({"partitions": {"low": {}, "small": {"hours": 2, "nodes": 1}}, "nodes": 2}, "24"),
        ({"limits": {"hours": 4}}, None),
        ({"partitions": {"low": {}, "small": {"hours": 2}}}, None),
    ],
    ids=["by-default", "limits", "of-the-partition", "larger-jobs", "allowed", "another-partition"],
)
def test_a_partition_whose_jobs_end_too_early_is_named_with_both_hours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], asked: str | None
) -> None:
    low = examine(tmp_path, monkeypatch, **changes)["partition low"]
    assert low.works is (asked is None)
    if asked is not None:
        assert low.needed
        assert f"its jobs end after 4 h, and jobs ask for {asked}:" in low.found
        assert low.remedy == "set limits.hours, or hours of partitions.low, to 4"


def test_a_controller_that_goes_away_meanwhile_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = f'case "$1" in ping) echo up;; *) {GONE};; esac'
    found = examine(tmp_path, monkeypatch, scontrol=gone)["slurm.conf"]
    assert not found.works
    assert "Unable to contact slurm controller" in found.found
