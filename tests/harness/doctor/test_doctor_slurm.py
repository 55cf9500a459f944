"""What the doctor makes of SLURM's answers, where a cluster of one's own would not give them."""

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
    """What is found of a profile where SLURM's programs answer so; others are not there."""
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
    ],
    ids=["by-default", "limits", "of-the-partition", "larger-jobs"],
)
def test_a_partition_that_takes_no_job_for_so_long_is_named_with_both_hours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], asked: str
) -> None:
    low = examine(tmp_path, monkeypatch, **changes)["partition low"]
    assert (low.works, low.needed) == (False, True)
    assert f"its jobs end after 4 h, and jobs ask for {asked}:" in low.found
    assert low.remedy == "set limits.hours, or hours of partitions.low, to 4"


@pytest.mark.parametrize(
    "changes",
    [{"limits": {"hours": 4}}, {"partitions": {"low": {}, "small": {"hours": 2}}}],
    ids=["limits", "another-partition"],
)
def test_a_partition_that_takes_jobs_for_so_long_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    assert examine(tmp_path, monkeypatch, **changes)["partition low"].works


def test_a_controller_that_goes_away_meanwhile_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = f'case "$1" in ping) echo up;; *) {GONE};; esac'
    found = examine(tmp_path, monkeypatch, scontrol=gone)["slurm.conf"]
    assert not found.works
    assert "Unable to contact slurm controller" in found.found
