"""On a real SLURM: a job that holds a Ray outlives its parts, or is given up with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness.record.control import Control
from harness.record.journal import Event, read_progress
from slurm.devcluster.cluster import DevCluster
from tests.cluster.packed import PackedJob
from tests.cluster.slurm_study import held_back
from tests.waiting import wait_until

pytestmark = pytest.mark.cluster

Fields = dict[str, Any]
Pack = Callable[..., PackedJob]


@pytest.fixture
def pack(devcluster: DevCluster, study_fields: Fields, tmp_path: Path) -> Iterator[Pack]:
    """Make a packed array; its job is cancelled after the test."""
    made: list[PackedJob] = []

    def pack(name: str = "packed", **shape: int) -> PackedJob:
        folder = tmp_path / name
        folder.mkdir()
        made.append(PackedJob(devcluster, folder, study_fields, **shape))
        return made[-1]

    yield pack
    for job in made:
        job.cancel()
    for job in made:
        wait_until(lambda job=job: not job.state() and not job.processes())


def test_a_job_outlives_its_controller_its_raylets_and_its_time(pack: Pack) -> None:
    job = pack()
    job.submit()
    everything = {"n1": ["0", "1"], "n2": ["0", "1"]}
    wait_until(lambda: job.told("offered")[-1:] == [everything])
    assert job.address is not None

    psutil.Process(job.controllers()[-1]).kill()
    wait_until(lambda: len(job.controllers()) == 2)
    assert job.told("offered")[-1] == everything

    raylets = job.named("raylet")
    worst = next(process for process in raylets if process.environ().get("SLURMD_NODENAME") == "n2")
    worst.kill()
    wait_until(
        lambda: {process.pid for process in job.named("raylet")} - {process.pid for process in raylets}
    )
    wait_until(lambda: job.told("offered")[-1] == everything and len(job.told("offered")) > 2)
    assert len(job.controllers()) == 2  # it went on

    first = job.address
    with held_back(job.slurm):  # else SLURM starts it again after a few seconds
        # The signal that the batch file asks SLURM for near the time limit.
        job.slurm("scancel", "--batch", "--signal=USR2", job.job_id)
        wait_until(lambda: job.told("told") == [["SIGUSR2"]])
        wait_until(lambda: f"requeueing job {job.job_id}" in job.out)
        wait_until(lambda: job.state() == "PENDING" and not job.processes())
        assert job.address is None
        assert not first.token_file.exists()
        assert not first.temp_dir.exists()
        job.cancel()


@pytest.mark.verify
def test_a_controller_that_keeps_dying_is_given_up_with_the_reason_in_its_runs(pack: Pack) -> None:
    job = pack(nodes=1)
    (job.study_dir / "breaks").touch()
    job.submit()
    wait_until(lambda: job.state() == "" and job.out)
    reasons = {str((read_progress(folder).result or {}).get("reason")) for folder in job.run_dirs}
    assert len(reasons) == 1
    assert "stopped 3 times at the same place" in reasons.pop()
    assert "ModuleNotFoundError: No module named 'torch'" in job.out
    assert {read_progress(folder).state for folder in job.run_dirs} == {Event.FAILED}
    control = Control(job.study_dir / "control.jsonl")
    assert [event["event"] for event in control.read()] == ["crashed"] * 3
    assert not job.processes()


@pytest.mark.verify
def test_two_allocations_on_one_node_do_not_disturb_each_other(pack: Pack) -> None:
    jobs = [pack(name, nodes=1) for name in ("first", "second")]
    for job in jobs:
        job.submit("--nodelist=n1")
    wait_until(lambda: all(job.told("offered") for job in jobs))
    first, second = jobs
    assert sorted(job.told("offered")[0]["n1"] for job in jobs) == [["0", "1"], ["2", "3"]]
    assert first.address is not None
    assert second.address is not None
    assert first.address.address != second.address.address
    assert first.address.temp_dir != second.address.temp_dir

    first.slurm("scancel", first.job_id)
    wait_until(lambda: not first.state() and not first.processes())
    assert not first.address
    (second.study_dir / "enough").touch()
    wait_until(lambda: not second.state() and not second.processes())
    assert second.told("offered") == [second.told("offered")[0]] * 2
    assert len(second.controllers()) == 1
    assert f"job {first.job_id} was cancelled" in first.out
    assert "2 runs are left: other processes train them" in second.out
