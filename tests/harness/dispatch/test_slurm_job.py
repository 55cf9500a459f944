"""A SLURM job whose ranks have ended is requeued or ends, by the journals and by scontrol's answer."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from harness.common.disk import make_folder
from harness.dispatch.base import Task
from harness.dispatch.slurm.job import rank_logs, settle, start_of
from harness.record.journal import Event, read_progress
from harness.record.kinds import Kind
from harness.record.root import Launch, Root, write_launch, write_run
from harness.train.stopping import EXIT_PREEMPTED
from tests.harness.journals import begin_series, registered
from tests.programs import write_program
from tests.studies import Fields


class Stopped:
    """A Series whose job is told to stop again and again, before it has saved anything."""

    def __init__(self, root: Root, fields: Fields) -> None:
        fields["grid"] |= {"iterations": [10], "seeds": [0]}
        point = registered(root, fields).points[0]
        self.root, self.run = root, point.run
        control = root.study(fields["name"]) / "control.jsonl"
        self.task = Task(series_id=point.series_id, run_dirs=(write_run(root, point.run),))
        begin_series(root, point.run).close()
        launch = Launch(corpus=Path("corpus"), control=control, dispatcher="slurm", micro_batch=1)
        write_launch(root, point.series_id, launch)

    def by(self, name: str, code: int = 0) -> int:
        start, began = start_of(self.task, Path()), time.time() - 1
        before = start.place()
        with begin_series(self.root, self.run) as journal:
            journal.append(Event.PREEMPTED, reason=name)
        return settle(start, code, began, before)

    def meets(self, line: str) -> int:
        """A rank logs a line, and its node ends all ranks."""
        start, logs = start_of(self.task, Path()), rank_logs(self.task)
        make_folder(self.task.folder / "logs")
        with (self.task.folder / "logs" / "rank-0.log").open("a") as log:
            log.write(f"Traceback\n{line}\n")
        return settle(start, 1, time.time() + 1, start.place(), logs=logs)

    def dies(self, code: int = 1, began: float | None = None, stall: str | None = None) -> int:
        """The ranks of a start end: of a later one, before they write anything, unless it `began` earlier."""
        start = start_of(self.task, Path())
        before = start.place()
        if stall is not None:
            self.task.note_stall(stall)
        return settle(start, 137 if stall else code, began or time.time() + 1, before, stall)

    def logs(self, *said: str) -> None:
        """The log of its job has these lines since its newest start."""
        log = self.root.study("tiny") / "logs" / "slurm" / "ssmscale-a" / "7_0_log.out"
        log.parent.mkdir(parents=True)
        before = ["srun: error: said before an earlier start", "series s: srun starts 1 ranks on n1"]
        log.write_text("\n".join([*before, *said]))

    @property
    def reason(self) -> str:
        """The reason why its Run failed."""
        return str((read_progress(self.task.run_dirs[0]).result or {})["reason"])

    @property
    def state(self) -> str | None:
        return read_progress(self.task.run_dirs[0]).state


def test_a_job_whose_time_ends_without_progress_is_started_three_times(
    scontrol: Path, tmp_path: Path, study_fields: Fields
) -> None:
    stopped = Stopped(Root(tmp_path / "runs"), study_fields)
    assert [stopped.by("SIGUSR2") for _ in range(3)] == [EXIT_PREEMPTED, EXIT_PREEMPTED, 1]
    assert scontrol.read_text().split() == ["7_0", "7_0"]
    result = read_progress(stopped.task.run_dirs[0]).result
    assert result is not None
    assert "because its time limit was reached" in result["reason"]


@pytest.mark.parametrize("code", [128 + signal.SIGUSR2, 128 + signal.SIGKILL], ids=["told", "killed"])
def test_a_job_whose_start_outlasts_its_time_limit_fails_for_that_limit(
    scontrol: Path, tmp_path: Path, study_fields: Fields, code: int
) -> None:
    """A rank that still makes its imports dies of the signal, and writes nothing."""
    if code == 128 + signal.SIGKILL:
        (tmp_path / "more").write_text("JobState=COMPLETING Reason=TimeLimit")
    stopped = Stopped(Root(tmp_path / "runs"), study_fields)
    assert [stopped.dies(code=code) for _ in range(3)] == [EXIT_PREEMPTED, EXIT_PREEMPTED, 1]
    assert "its time limit was reached; raise limits.hours" in stopped.reason


def test_a_job_that_slurm_kills_for_memory_is_requeued_with_half_the_micro_batch(
    scontrol: Path, tmp_path: Path, study_fields: Fields
) -> None:
    stopped = Stopped(Root(tmp_path / "runs"), study_fields)
    said = "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=7.0. Some of your processes may have been killed"
    stopped.logs(said, "srun: error: n1: task 0: Out Of Memory")
    for micro_batch in (16, 8, 4, 2):
        with begin_series(stopped.root, stopped.run, layout={"micro_batch": micro_batch}, device="cpu"):
            assert stopped.dies(code=137, began=1.0) == EXIT_PREEMPTED
        told = read_progress(stopped.task.folder)
        assert told.kind is Kind.OUT_OF_MEMORY
        assert str(told.stopped_by).startswith(
            f"out of memory with micro-batch {micro_batch}: srun: error: n1: task 0"
        )
    assert scontrol.read_text().split() == ["7_0"] * 4


def test_a_job_that_stalls_at_the_same_place_is_started_three_times(
    scontrol: Path, tmp_path: Path, study_fields: Fields
) -> None:
    stopped = Stopped(Root(tmp_path / "runs"), study_fields)
    stall = "nothing moved for 5 min in step 7"
    assert [stopped.dies(stall=stall) for _ in range(3)] == [EXIT_PREEMPTED, EXIT_PREEMPTED, 1]
    result = read_progress(stopped.task.run_dirs[0]).result
    assert result is not None
    assert result["reason"] == f"its job 7_0 ended 3 times at the same place; {stall}"


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (
            [
                "srun: fatal: SLURM_MEM_PER_CPU, SLURM_MEM_PER_GPU, and SLURM_MEM_PER_NODE are mutually exclusive.",
            ],
            "SLURM said: srun: fatal: SLURM_MEM_PER_CPU, SLURM_MEM_PER_GPU",
        ),
        (
            [
                "2026-01-01 00:00:00 series s: step 3",
                "slurmstepd: error: StepId=7.0 exceeded memory limit (600 > 500), being killed",
                "slurmstepd: error: *** STEP 7.0 ON n1 CANCELLED AT 2026-01-01T00:00:00 ***",
                "slurmstepd-n1: error: *** JOB 7 ON n1 CANCELLED AT 2026-01-01T00:00:00 DUE TO JOB REQUEUE ***",
                "srun: error: n1: task 0: Killed",
            ],
            "SLURM said: slurmstepd: error: StepId=7.0 exceeded memory limit (600 > 500), being killed",
        ),
        (
            ["ImportError: no torch", "srun: error: n1: task 0: Exited with exit code 1"],
            "its log ends: ImportError: no torch",
        ),
        (
            ["srun: error: n1: task 0: Segmentation fault"],
            "its log ends: srun: error: n1: task 0: Segmentation fault",
        ),
        ([], "its log ends: nothing"),
    ],
    ids=["srun", "memory", "rank", "signal", "nothing"],
)
def test_a_job_fails_for_the_error_that_slurm_or_a_rank_said_last_and_for_none_of_its_consequences(
    scontrol: Path, tmp_path: Path, study_fields: Fields, said: list[str], reason: str
) -> None:
    stopped = Stopped(Root(tmp_path / "runs"), study_fields)
    stopped.logs(*said)
    assert [stopped.dies() for _ in range(3)] == [EXIT_PREEMPTED, EXIT_PREEMPTED, 1]
    assert reason in stopped.reason


@pytest.mark.parametrize(
    ("told", "more"),
    [("SIGTERM", ""), ("SIGUSR2", "PreemptTime=2026-01-01T00:00:00")],
    ids=["told-to-end", "preempted"],
)
def test_a_preempted_job_is_requeued_any_number_of_times(
    scontrol: Path, tmp_path: Path, study_fields: Fields, told: str, more: str
) -> None:
    (tmp_path / "more").write_text(more)
    stopped = Stopped(Root(tmp_path / "runs"), study_fields)
    assert [stopped.by(told) for _ in range(4)] == [EXIT_PREEMPTED] * 4
    assert scontrol.read_text().split() == ["7_0"] * 4
    assert stopped.state is None


def test_a_job_that_ran_out_of_memory_and_then_does_not_begin_is_started_three_times(
    scontrol: Path, tmp_path: Path, study_fields: Fields
) -> None:
    stopped = Stopped(Root(tmp_path / "runs"), study_fields)
    assert [stopped.by(f"out of memory with micro-batch {2**k}", code=143) for k in range(4)] == [
        EXIT_PREEMPTED
    ] * 4
    assert [stopped.dies() for _ in range(3)] == [EXIT_PREEMPTED, EXIT_PREEMPTED, 1]
    assert scontrol.read_text().split() == ["7_0"] * 6


ECC = "RuntimeError: CUDA error: uncorrectable ECC error encountered"


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        (("n1", "n2", "n3", "n4"), "its job 7_0 met 3 bad nodes: n1 ("),
        (
            ("n1", "n2"),
            "its job 7_0 met a bad node, and partition p has too few nodes besides the bad ones: n1 (",
        ),
    ],
    ids=["three-bad-nodes", "no-node-left"],
)
def test_a_task_that_bad_nodes_fail_ends_with_their_names_and_only_then(
    scontrol: Path,
    tmp_path: Path,
    study_fields: Fields,
    monkeypatch: pytest.MonkeyPatch,
    nodes: tuple[str, ...],
    said: str,
) -> None:
    (tmp_path / "more").write_text("Partition=p NumNodes=1-1 ExcNodeList=(null)")
    write_program(tmp_path / "bin" / "sinfo", f"printf '%s\\n' {' '.join(nodes)}")
    stopped = Stopped(Root(tmp_path / "runs"), study_fields)
    assert [stopped.dies(), stopped.dies()] == [EXIT_PREEMPTED] * 2
    codes = []
    for node in nodes[: min(3, len(nodes))]:
        monkeypatch.setenv("SLURM_JOB_NODELIST", node)
        codes.append(stopped.meets(ECC))
        assert (stopped.state == Event.FAILED) == (codes[-1] == 1)
    assert codes == [EXIT_PREEMPTED] * (len(codes) - 1) + [1]
    result = read_progress(stopped.task.run_dirs[0]).result
    assert result is not None
    assert result["reason"].startswith(said)
    assert ECC in result["reason"]
