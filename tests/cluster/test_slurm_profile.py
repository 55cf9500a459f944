"""On a real SLURM: every key of a profile reaches the jobs, and no job is dropped in silence at a site's limits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.plan.cluster import Profile
from harness.record.nodes import NODE_FAILURES
from slurm.devcluster.cluster import DevCluster
from tests.cluster.slurm_study import PROFILE, Make, SlurmStudy

pytestmark = pytest.mark.cluster


@pytest.fixture
def reserved(make: Make, devcluster: DevCluster) -> Iterator[SlurmStudy]:
    """A study of six Series whose jobs wait, on a cluster with a reservation."""
    study = make()
    study.fields["grid"]["seeds"] = list(range(6))
    study.study.write_text(yaml.safe_dump(study.fields))
    study.slurm(
        *("scontrol", "create", "reservation", "reservationname=ours", "users=root", "nodes=n1"),
        *("starttime=now", "duration=60", "flags=ignore_jobs"),
    )
    study.slurm("scontrol", "update", "partitionname=low", "state=down")
    yield study
    study.slurm("scontrol", "update", "partitionname=low", "state=up")
    study.slurm("scancel", "--user=root")
    study.wait_until_over()
    study.slurm("scontrol", "delete", "reservationname=ours")


def set_profile(study: SlurmStudy, **changes: Any) -> None:
    study.profile_path.write_text(yaml.safe_dump({**PROFILE, **changes}, sort_keys=False))


def test_every_key_of_a_profile_reaches_the_job(reserved: SlurmStudy, account: str) -> None:
    profile = {
        "partitions": {"low": {"hours": 0.2, "nodes": 2, "qos": "normal"}},
        "nodes": 2,
        "gpus": 2,
        "gpu_type": "fake",
        "gpu_memory_gib": 1,
        "cores": 4,
        "memory_gib": 4,
        "peak_flops": {"fp32": 1.0e12},
        "mfu": 0.4,
        "account": account,
        "qos": "few",
        "constraint": "virtual",
        "exclude": "n2",
        "reservation": "ours",
        "setup": ["export FROM_SETUP=1", "ulimit -c 0"],
        "container": {"runtime": "apptainer", "image": "docker://registry.example.org/train:1"},
        "node_failures": ["lab disk: .* sick"],
        "snapshot": False,
        "signal_seconds": 33,
        "limits": {"array_size": 40, "jobs": 100, "parallel": 2, "hours": 1},
        "shared": ["/"],
        "confirm_gpu_hours": 50,
    }
    assert {"name", *profile} == set(Profile.model_fields), "a key was added: say here where it goes"
    set_profile(reserved, **profile)
    reserved.submit()
    job = reserved.queue()[0].split()[0]
    shown = reserved.asked(job)
    for said in (
        "Partition=low ",
        f"Account={account} ",
        "QOS=normal ",
        "Features=virtual ",
        "ReqNodeList=(null) ExcNodeList=n2 ",
        "Reservation=ours ",
        "TimeLimit=00:12:00 ",
        "MinMemoryNode=2G ",
        "TresPerNode=gres:gpu:fake:1",
        "ArrayTaskThrottle=2 ",
        "Requeue=1 ",
        "NumNodes=1",
    ):
        assert said in shown, (said, shown)
    container = reserved.arrays()[-1].container
    assert container is not None
    assert (container.image, container.flags) == ("docker://registry.example.org/train:1", ("--nv",))
    script = reserved.slurm("scontrol", "write", "batch_script", job, "-")
    lines = script.splitlines()
    assert "#SBATCH --signal=USR2@33" in lines
    assert "#SBATCH --array=0-5%2" in lines
    assert f"export {NODE_FAILURES}='[\"lab disk: .* sick\"]'" in lines
    commands = [number for number, line in enumerate(lines) if "harness.dispatch.slurm.job" in line]
    command = commands[-1]  # the first says what to do once a setup line ends the job
    assert lines.index("export FROM_SETUP=1") < lines.index("ulimit -c 0") < command


def test_a_job_goes_to_the_partition_of_its_one_qos(reserved: SlurmStudy, account: str) -> None:
    partitions = {"low": {"qos": "normal"}, "high": {"qos": "few"}}
    set_profile(reserved, partitions=partitions, account=account)
    reserved.submit()
    job = reserved.queue()[0].split()[0]
    shown = reserved.asked(job)
    assert "Partition=low " in shown
    assert "QOS=normal " in shown


def test_more_jobs_than_a_site_takes_are_never_dropped_in_silence(reserved: SlurmStudy, account: str) -> None:
    under = {"account": account, "qos": "few"}
    set_profile(reserved, **under)
    said = reserved.submit(status=1)
    assert "QOSMaxSubmitJobPerUserLimit" in said
    assert "limits.jobs" in said
    assert reserved.queue() == []
    set_profile(reserved, **under, limits={"hours": 1, "jobs": 3})
    assert "3 series not submitted" in reserved.submit()
    assert len(reserved.queue()) == 3
    said = reserved.submit()
    assert "3 series not submitted" in said
    assert "SLURM jobs" not in said
    set_profile(reserved, account=account, limits={"hours": 1, "jobs": 5})
    assert "1 series not submitted" in reserved.submit()
    set_profile(reserved, account=account, limits={"hours": 1, "jobs": 50})
    assert "not submitted" not in reserved.submit()
    assert len(reserved.queue()) == 6


def test_a_job_that_ends_before_its_ranks_begin_is_reported_with_the_output_of_its_script(make: Make) -> None:
    study = make(setup=["echo no such module here", "exit 7"])
    study.submit()
    study.wait_until_over()
    rows = study.status()["runs"]
    (series,) = study.tasks()
    assert {row["state"] for row in rows} == {"new"}
    assert {row["reason"] for row in rows} == {f"job {study.job(series)} is over: FAILED"}
    assert "no such module here" in study.run("logs", rows[0]["run_id"])


def test_a_cluster_takes_and_removes_only_a_directory_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("dear to me")
    with pytest.raises(RuntimeError, match="holds no cluster"):
        DevCluster(tmp_path).down()
    with pytest.raises(RuntimeError, match="not empty"):
        DevCluster(tmp_path).up()
    assert (tmp_path / "mine").exists()
