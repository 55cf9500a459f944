"""Output of squeue and sacct is read as jobs, and arrays are submitted with the profile's options."""

from dataclasses import replace
from pathlib import Path

import pytest

from harness.common.format import Estimate
from harness.dispatch.arrays import ArrayStore, new_array
from harness.dispatch.base import SubmitTarget, Task
from harness.dispatch.ray.packed import PackedBackend
from harness.dispatch.slurm import queue
from harness.dispatch.slurm.backend import SlurmBackend
from harness.dispatch.slurm.job import _run_ranks
from harness.dispatch.slurm.queue import (
    STATES,
    _from_sacct,
    _from_squeue,
    explain,
    put_together,
    read_jobs,
    seconds_of,
    state_of,
)
from harness.plan.allocation import Shape
from harness.plan.cluster import Partition, Profile
from harness.record.jobs import JobState
from harness.record.registry import ResolvedStudy
from tests.conftest import Command

SHAPE = Shape(nodes=1, ranks=1, threads=1, memory_gib=1.0)

OF_A_SHELL = (
    *("SQUEUE_PARTITION", "SACCT_FORMAT", "SBATCH_PARTITION", "SBATCH_TIMELIMIT", "SALLOC_QOS"),
    *("SLURM_MEM_PER_CPU", "SLURM_EXPORT_ENV", "SRUN_EXPORT_ENV", "SLURM_CPU_BIND", "SLURM_CPU_BIND_TYPE"),
    *("SRUN_CPUS_PER_TASK", "SLURM_EXACT", "SLURM_NTASKS", "SLURM_STEP_ID", "SLURM_CPUS_PER_TASK"),
    *("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_SIZE", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"),
)
"""Variables of an interactive session, and of torchrun and mpirun in it."""


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of programs with SLURM's names that print PROGRAM.says, and keep their arguments and environment."""
    for name in ("squeue", "sacct", "sbatch", "srun", "scontrol"):
        program = tmp_path / name
        program.write_text(
            f'#!/bin/sh\n/usr/bin/env > "$0.environment"\necho "$@" > "$0.arguments"\n'
            f'cat "$0.says" 2> /dev/null || exit {int(name == "sacct")}\n'
        )
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for name in OF_A_SHELL:
        monkeypatch.setenv(name, "hidden")
    for name in ("SLURM_CONF", "SLURM_JWT", "CUDA_HOME", "WORLD_SIZES"):
        monkeypatch.setenv(name, "seen")
    return tmp_path


def test_the_users_environment_hides_no_job_and_odd_lines_are_skipped(programs: Path) -> None:
    said = "CLUSTER: c\n\n12_3|ssmscale-a|RUNNING|0:07|n1|None\n"
    (programs / "squeue.says").write_text(said)
    (programs / "sacct.says").write_text("CLUSTER: c\n12_3|ssmscale-a|RUNNING|7|n1\n")
    (view,) = read_jobs(["ssmscale-a"], 1e9).values()
    assert (view.state, view.seconds, view.accounted_seconds) == (JobState.RUNNING, 7, 7)
    assert "hidden" not in (programs / "squeue.environment").read_text()
    assert "hidden" not in (programs / "sacct.environment").read_text()
    assert "--all" in (programs / "squeue.arguments").read_text().split()


def test_a_scheduler_that_does_not_answer_is_waited_for_once(
    resolved: ResolvedStudy, programs: Path, ssmscale: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("squeue", "sacct"):
        (programs / name).write_text('#!/bin/sh\necho asked >> "$0.asked"\nexec sleep 60\n')
    monkeypatch.setattr(queue, "SECONDS", 1.0)
    monkeypatch.setattr(queue, "_silent", {})
    root, name = resolved.root, resolved.study.name
    run_dirs = tuple(root.run(point.run_id) for point in resolved.points)
    array = new_array("ssmscale-1", SHAPE, [Task(series_id="s", run_dirs=run_dirs)])
    ArrayStore(root.study(name)).write(array.model_copy(update={"job_id": "7"}))
    cancelled = ssmscale("cancel", name, "--root", root.path)
    assert cancelled.status == 0
    assert "2 runs cancelled" in cancelled.out
    assert "has not answered for 1 s; jobs of cancelled runs are not taken from it" in cancelled.err
    assert (programs / "squeue.asked").read_text() == "asked\n"


def test_a_job_is_submitted_as_its_profile_says_and_nothing_else(programs: Path, tmp_path: Path) -> None:
    (programs / "sbatch.says").write_text("Submitted batch job 77\n")
    profile = Profile(
        name="c", partitions={"low": Partition()}, gpus=0, cores=1, memory_gib=1.0, signal_seconds=1200
    )
    backend = SlurmBackend(tmp_path / "study", SubmitTarget("slurm", profile))
    (handle,) = backend.submit([Task(series_id="s", run_dirs=(tmp_path / "runs" / "r",))])
    assert handle.job_id == "77_0"
    environment = (programs / "sbatch.environment").read_text()
    assert "hidden" not in environment
    assert environment.count("=seen") == 4
    (script,) = (tmp_path / "study" / "logs").rglob("77_submission.sh")
    assert "#SBATCH --partition=low\n" in script.read_text()
    assert "#SBATCH --time=35\n" in script.read_text()  # what it trains, and what it needs to save
    assert "wckey" not in script.read_text()


def test_ranks_start_as_their_job_says_whatever_its_shell_says(
    programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {
        "SLURM_ARRAY_JOB_ID": "77",
        "SLURM_ARRAY_TASK_ID": "0",
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_MEM_PER_NODE": "500",
        "SLURM_GPUS_PER_NODE": "2",
        "CUDA_VISIBLE_DEVICES": "0,1",
        "SUBMITIT_EXECUTOR": "slurm",
    }
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    task = Task(series_id="s", run_dirs=(tmp_path / "runs" / "r",), ranks=4, nodes=2)
    shape = Shape(nodes=2, ranks=4, threads=1, memory_gib=1.0)
    (programs / "srun.says").write_text("")
    assert _run_ranks(new_array("ssmscale-a", shape, [task]), task, tmp_path) == (0, None)
    environment = (programs / "srun.environment").read_text()
    assert "hidden" not in environment
    assert {f"{name}={value}" for name, value in own.items()} <= set(environment.split())
    words = (programs / "srun.arguments").read_text().split()
    assert {"--nodes=2", "--ntasks=4", "--ntasks-per-node=2", "--cpus-per-task=1", "--export=ALL"} <= set(
        words
    )
    assert words[words.index("--ranks") + 1] == "4"


def test_slurm_signals_a_packed_jobs_script_before_its_time_is_over(programs: Path, tmp_path: Path) -> None:
    (programs / "sbatch.says").write_text("Submitted batch job 77\n")
    profile = Profile(name="c", partitions={"low": Partition()}, gpus=0, cores=2, memory_gib=1.0)
    backend = PackedBackend(tmp_path / "study", SubmitTarget("ray", profile))
    hours = Estimate(0.1, 0.1, 0.1)
    backend.submit([Task(series_id="s", run_dirs=(tmp_path / "runs" / "r",), hours=hours)])
    (script,) = (tmp_path / "study" / "logs").rglob("77_submission.sh")
    assert f"#SBATCH --signal=B:USR2@{profile.signal_seconds}\n" in script.read_text()


@pytest.mark.parametrize(
    ("said", "seconds"),
    [("0:07", 7), ("3:20", 200), ("1:00:01", 3601), ("2-00:00:00", 172_800), ("INVALID", 0)],
)
def test_squeues_times_are_read(said: str, seconds: float) -> None:
    assert seconds_of(said) == seconds


@pytest.mark.parametrize("reason", ["Resources", "Nodes|down"], ids=["plain", "with-the-separator"])
def test_an_element_of_an_array_waits_for_its_reason(reason: str) -> None:
    view = _from_squeue(f"12_3|ssmscale-a|PENDING|0:00||{reason}")
    assert view is not None
    assert (view.job_id, view.state, view.reason) == ("12_3", JobState.QUEUED, reason)


def test_the_user_who_cancelled_a_job_is_not_part_of_its_state() -> None:
    view = _from_sacct("12_3|ssmscale-a|CANCELLED by 1000|17|n1")
    assert view is not None
    assert (view.state, view.seconds) == (JobState.PREEMPTED, 17)


def test_elements_that_wait_together_are_left_to_squeue() -> None:
    assert _from_sacct("12_[4-9%2]|ssmscale-a|PENDING|0|None assigned") is None


def test_every_state_of_slurms_manual_is_known() -> None:
    codes = """
        BOOT_FAIL CANCELLED COMPLETED CONFIGURING COMPLETING DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PENDING PREEMPTED
        RUNNING RESV_DEL_HOLD REQUEUE_FED REQUEUE_HOLD REQUEUED RESIZING REVOKED SIGNALING SPECIAL_EXIT STAGE_OUT
        STOPPED SUSPENDED TIMEOUT
    """
    newer = ["EXPEDITING", "LAUNCH_FAILED", "POWER_UP_NODE", "RECONFIG_FAIL", "UPDATE_DB"]
    assert {*codes.split(), *newer} == set(STATES)


def test_an_unknown_state_is_not_the_end_of_a_job() -> None:
    assert state_of("TELEPORTING") is JobState.RUNNING
    assert state_of("RUNNING+") is JobState.RUNNING
    assert state_of("") is None


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("Priority", "higher priority"),
        ("Resources", "no nodes are free"),
        ("QOSMaxJobsPerUserLimit", "no more running jobs"),
        ("QOSMaxGRESPerUser", "the QOS allows no more"),
        ("AssocGrpCPUMinutesLimit", "of the account together"),
        ("BeginTime", "requeued"),
        ("ReqNodeNotAvail, UnavailableNodes:n[1-2]", "down, reserved or taken"),
        ("launch failed requeued held", "scontrol release"),
    ],
)
def test_a_reason_is_given_with_its_meaning(reason: str, said: str) -> None:
    assert explain(reason).startswith(f"{reason} (")
    assert said in explain(reason)


def test_an_unknown_reason_is_given_as_it_is() -> None:
    assert explain("PhaseOfTheMoon") == "PhaseOfTheMoon"


def test_a_requeued_job_has_the_state_of_the_queue_and_the_time_of_its_accounts() -> None:
    waits = _from_squeue("12_3|ssmscale-a|PENDING|0:00||BeginTime")
    ended = _from_sacct("12_3|ssmscale-a|PREEMPTED|17|n1")
    assert waits is not None
    assert ended is not None
    (view,) = put_together({"12_3": waits}, {"12_3": replace(ended, accounted_seconds=40.0)}).values()
    assert (view.state, view.accounted_seconds) == (JobState.QUEUED, 40.0)


def test_a_job_that_runs_by_its_accounts_and_is_not_in_the_queue_is_lost() -> None:
    stale = _from_sacct("12_3|ssmscale-a|RUNNING|17|n1")
    assert stale is not None
    view = put_together({}, {"12_3": replace(stale, accounted_seconds=9e9)})["12_3"]
    assert (view.state, view.accounted_seconds) == (JobState.LOST, None)
