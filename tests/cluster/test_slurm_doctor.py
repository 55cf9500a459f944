"""The doctor on a real SLURM: it confirms what holds of a profile, and says what to do about the rest."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.doctor.cluster import examine_cluster, file_system
from harness.doctor.machine import Finding
from slurm.devcluster.cluster import DevCluster
from tests.checkouts import environment_of
from tests.cluster.slurm_study import PROFILE
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.cluster

Examine = Callable[..., dict[str, Finding]]


@pytest.fixture
def examine(devcluster: DevCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Examine:
    """Examine the cluster under a profile with changes; returns the findings by name."""
    for name, value in devcluster.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def examine(**changes: Any) -> dict[str, Finding]:
        path = tmp_path / "profile.yaml"
        limits = {"hours": 1, "array_size": 50}
        path.write_text(yaml.safe_dump({**PROFILE, "limits": limits, **changes}))
        return {found.name: found for found in examine_cluster(str(path), tmp_path / "runs")}

    return examine


def test_the_command_finds_that_everything_about_a_cluster_works_but_its_array_size(
    devcluster: DevCluster, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "harness", "doctor", "--cluster", "devcluster", "--json"],
        env={**environment_of(REPOSITORY), **devcluster.env, "SSMSCALE_ROOT": str(tmp_path / "runs")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    for name in ("sbatch", "profile", "setup lines", "slurmctld", "partition low", "requeue", "a job"):
        assert checks[name]["works"], checks[name]
    assert not checks["array size"]["works"]  # the tests' cluster takes 50
    assert "50" in checks["array size"]["remedy"]
    assert done.returncode == 1


def test_a_profile_that_holds_is_confirmed(examine: Examine, account: str) -> None:
    findings = examine(account=account, qos="few", gpu_type="fake", setup=["export A=1"], shared=["/"])
    assert [finding for finding in findings.values() if not finding.works] == []
    assert {"account lab", "QOS few", "array size"} <= findings.keys()


@pytest.mark.parametrize(
    ("changes", "name", "said"),
    [
        ({"partitions": {"low": None, "nosuch": None}}, "partition nosuch", ["high, low"]),
        ({"partitions": {"high": {"nodes": 9}}, "nodes": 9}, "partition high", ["fewer than 9", "nodes"]),
        ({"gpus": 8}, "partition low", ["no node has 8 GPUs", "4 fake GPUs"]),
        ({"gpus": 8}, "a job", ["configuration is not available"]),
        ({"gpu_type": "h100"}, "partition low", ["no node has 2 h100 GPUs", "gpu_type"]),
        ({"memory_gib": 99}, "partition low", ["99 GiB", "memory_gib"]),
        ({"account": "nosuch"}, "account nosuch", ["may charge", "root"]),
        ({"account": "nosuch"}, "a job", ["account"]),
        ({"qos": "nosuch"}, "QOS nosuch", ["may use", "normal", "qos"]),
        ({"constraint": "nosuch"}, "a job", ["feature"]),
        ({"reservation": "nosuch"}, "a job", ["reservation"]),
        ({"limits": {"array_size": 51}}, "array size", ["MaxArraySize is 50", "to 50"]),
        ({"setup": ["if true", "module load x"]}, "setup lines", ["syntax error", "setup"]),
        ({"shared": ["/nowhere"]}, "root on the nodes", ["/nowhere", "--root"]),
        ({"gpu": 2}, "profile", ["gpu", "gpus"]),
        ({}, "root on the nodes", ["this machine", "--root"]),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_key_that_does_not_hold_is_named_with_a_remedy(
    examine: Examine, changes: dict[str, Any], name: str, said: list[str]
) -> None:
    finding = examine(**changes)[name]
    assert not finding.works
    assert finding.remedy
    for word in said:
        assert word.lower() in f"{finding.found} {finding.remedy}".lower()


def test_a_cluster_that_does_not_answer_is_named_once(
    examine: Examine, devcluster: DevCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (devcluster.home / "slurm.conf").read_text()
    (tmp_path / "slurm.conf").write_text(re.sub(r"SlurmctldPort=\d+", "SlurmctldPort=1", text))
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    findings = examine()
    assert not findings["slurmctld"].works
    assert "SLURM_CONF" in str(findings["slurmctld"].remedy)
    assert "partition low" not in findings
    assert findings["setup lines"].works


def test_without_slurms_programs_each_is_named(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    findings = examine()
    assert not any(findings[name].works for name in ("sbatch", "squeue", "scancel", "rsync"))
    assert "not installed" in findings["slurmctld"].found


def test_the_file_system_of_a_path_is_known() -> None:
    assert file_system(Path("/proc/self")) == "proc"
    assert file_system(Path("/proc/nosuch/folder")) == "proc"


def test_a_partition_that_is_down_and_nodes_that_are_drained_are_reported(
    examine: Examine, devcluster: DevCluster
) -> None:
    def scontrol(*words: str) -> None:
        environment = {**environment_of(REPOSITORY), **devcluster.env}
        subprocess.run(["scontrol", "update", *words], check=True, capture_output=True, env=environment)

    scontrol("partitionname=low", "state=down")
    scontrol("nodename=n[1-2]", "state=drain", "reason=tests")
    try:
        finding = examine()["partition low"]
    finally:
        scontrol("partitionname=low", "state=up")
        scontrol("nodename=n[1-2]", "state=resume")
    assert not finding.works
    assert not finding.needed  # submitting is possible all the same
    assert "it takes no jobs now, no such node is up: 2 nodes drained" in finding.found
