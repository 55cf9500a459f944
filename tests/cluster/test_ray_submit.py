"""A study packed into one allocation of a real SLURM: submitted, watched, cancelled in part, and finished."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness.record.control import Control
from harness.record.journal import read_progress
from tests.cluster.slurm_study import Make, SlurmStudy, held_back
from tests.harness.trainer import losses, progress_of, undisturbed
from tests.waiting import wait_until

pytestmark = pytest.mark.cluster

Fields = dict[str, Any]

CORES: Fields = {"gpus": 0, "cores": 2, "memory_gib": 8}


def cluster_of(study: SlurmStudy) -> str:
    """Return the name that SLURM has for the cluster."""
    config = study.slurm("scontrol", "show", "config").splitlines()
    return next(line.split("=")[1].strip() for line in config if line.startswith("ClusterName"))


def test_every_series_is_handed_over_in_one_job_with_its_share_of_the_nodes(
    make: Make, study_fields: Fields
) -> None:
    study_fields["grid"]["seeds"] = [0, 1, 2]
    study = make(study_fields)  # of two GPUs a node, two cores and 4 GiB
    with held_back(study.slurm):
        said = study.submit("--nodes", "2", on="ray")
        assert "6 runs in 3 series packed on 2 nodes with 2 GPUs each submitted to dev: SLURM job" in said
        (job,) = study.queue()
        asked = study.asked(job.split()[0]).split()
        assert {"NumNodes=2-2", "CPUs/Task=2", "MinMemoryNode=4G", "TresPerNode=gres:gpu:2"} <= set(asked)
        assert study.arrays()[-1].slurm_cluster == cluster_of(study)
        now = study.status()
        assert now["counts"] == {"queued": 6}
        (allocation,) = now["allocations"]
        assert (allocation["state"], allocation["nodes"], allocation["gpus"]) == ("queued", 2, 4)
        assert "PartitionDown (its partition is down)" in study.run("status").splitlines()[-2]

        assert "nothing of tiny is left to submit" in study.submit(on="ray")
        study_fields["grid"]["seeds"] = [0, 1, 2, 3]
        full = make(study_fields, limits={"hours": 1, "jobs": 1}).submit(on="ray")
        assert "1 series not submitted: dev takes 1 jobs of yours at once" in full
        longer = make(study_fields)
        assert "2 runs in 1 series packed on 1 node with 1 GPU submitted" in longer.submit(on="ray")
        assert len(study.queue()) == 2

        first, *_ = [run["run_id"] for run in now["runs"]]
        assert "1 run cancelled" in study.run("cancel", first)
        assert len(study.queue()) == 2
        assert "2 jobs taken from SLURM" in study.run("cancel")
        assert "as in the last submission" in study.run("retry", first)
        assert study.arrays()[-1].packed
        study.run("cancel")
        assert study.queue() == []


@pytest.mark.verify
def test_auto_packs_what_needs_less_than_a_node_and_makes_jobs_of_the_rest(
    make: Make, study_fields: Fields
) -> None:
    study_fields["grid"] |= {"sizes": sizes(ranks=2), "seeds": [0, 1]}
    study = make(study_fields)
    said = study.submit("--dry-run", on="auto")
    assert "4 runs in 2 series packed in one job" in said
    assert "4 runs in 2 series in jobs of their own" in said
    with held_back(study.slurm):
        study.submit(on="auto")
        apart, packed = study.arrays()
        assert (apart.packed, packed.packed) == (False, True)
        assert {task.ranks for task in apart.tasks} == {2}
        assert {task.ranks for task in packed.tasks} == {1}
        assert len(study.queue()) == 3
        assert study.status()["counts"] == {"queued": 8}
        study.run("cancel")
        assert "on auto, cluster" in study.run("retry")
        assert len(study.queue()) == 3
        study.run("cancel")


def test_a_packed_study_is_watched_loses_its_controller_is_cancelled_in_part_and_finishes(
    make: Make, study_fields: Fields, tmp_path: Path
) -> None:
    endless = {"iterations": [100_000], "sizes": {"xs": {"resources": {"ranks": 2}}}}
    study_fields["grid"]["architectures"] = {"prefix_simba": None, "cross_transformer": endless}
    study_fields["grid"]["seeds"] = [0, 1]
    study_fields["tracking"] = {"log_every": 1}
    study = make(study_fields, **CORES)
    study.step_seconds = 0.05  # the endless Series leave the cores to the others
    study.submit("--nodes", "1", on="ray")
    long = [series for series, task in study.tasks().items() if task.ranks == 2]

    # Each of the two takes all GPUs.
    wait_until(lambda: any(read_progress(series).step for series in long))
    now = study.status()
    states = {run["run_id"]: run for run in now["runs"] if run["architecture"] == "cross_transformer"}
    (trained,) = [run for run in states.values() if run["state"] == "running"]
    (waits,) = [run for run in states.values() if run["state"] == "queued"]
    job_id = trained["job_id"]
    begun = read_progress(study.root.series(trained["series"])).started
    assert begun is not None
    assert begun["layout"]["ranks"] == 2
    assert waits["reason"] == f"waits for its turn in job {job_id}"
    (allocation,) = now["allocations"]
    assert (allocation["job_id"], allocation["state"], allocation["nodes"]) == (job_id, "running", 1)
    assert allocation["tunnel"].startswith("ssh -L ")

    (first,) = study.controllers()
    first.kill()
    wait_until(lambda: [process for process in study.controllers() if process != first])
    study.run("cancel", *states)
    study.wait_until_over()
    events = Control(study.root.study("tiny") / "control.jsonl").read()
    (crash,) = [event for event in events if event["event"] == "crashed"]
    assert crash["reason"].startswith("its controller ended with status -9")
    now = study.status()
    assert (now["counts"], now["allocations"]) == ({"done": 4, "cancelled": 2}, [])
    assert now["gpu_hours"]["used"] > 0
    small = {**study_fields, "grid": {**study_fields["grid"], "architectures": {"prefix_simba": None}}}
    assert losses(study.root, small) == pytest.approx(undisturbed(small), abs=1e-6)

    said = study.run("logs", next(run["run_id"] for run in now["runs"] if run["state"] == "done"))
    titles = [line for line in said.splitlines() if line.startswith("==>")]
    assert [title.split(":")[0] for title in titles[:2]] == [
        f"==> SLURM's log of job {job_id}",
        f"==> controller of job {job_id}",
    ]
    assert "worker, rank 0" in titles[-1]
    assert "4 finished runs are in" in study.run("sync")
    assert "nothing of tiny is left to submit" in study.submit(on="ray")


@pytest.mark.verify
def test_wherever_a_study_is_trained_the_same_runs_end_with_the_same_losses(
    make: Make, study_fields: Fields
) -> None:
    study_fields["grid"] |= {"sizes": sizes(ranks=2)}
    here, packed, jobs = (make(study_fields, name=name, **CORES) for name in ("here", "packed", "jobs"))
    here.run("submit", "--on", "local")
    packed.submit(on="ray")
    packed.wait_until_over()
    jobs.submit()
    jobs.wait_until_over()
    expected, runs = losses(here.root, study_fields), names(here)
    for study in (packed, jobs):
        assert losses(study.root, study_fields) == pytest.approx(expected, abs=1e-6)
        layouts = [
            progress.started["layout"]
            for progress in progress_of(study.root, study_fields)
            if progress.started
        ]
        assert [layout["ranks"] for layout in layouts] == [1, 1, 2, 2]
        assert names(study) == runs


def names(study: SlurmStudy) -> set[str]:
    return {path.name for path in study.root.path.glob("runs/*")}


def sizes(ranks: int) -> Fields:
    """Two sizes; the larger is trained by that number of ranks."""
    return {
        "xs": {"n_blocks": 1, "d_model": 16},
        "s": {"n_blocks": 1, "d_model": 24, "resources": {"ranks": ranks}},
    }
