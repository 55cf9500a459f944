"""What a SLURM job's batch script runs: start the ranks, wait for them, and have SLURM start them again where it must.

    python -m harness.dispatch.slurm.job ARRAY_FILE      inside a job; its index says which Series

The ranks save by themselves when they are told to stop. What became of their Runs is read from the journals, never
from exit codes. A job near its time limit or preempted is requeued under its own number; one that dies is requeued
too, until it has died several times at the same place, and so is one whose time is over before it has gained anything.

What SLURM says of the job this process is part of, and how it is had to start that job again.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tenacity import (
    Retrying,
    before_sleep_log,
    retry_if_exception_type,
    stop_after_delay,
    wait_exponential_jitter,
)

from harness.common.disk import DiskFull, make_folder
from harness.dispatch.arrays import Array, batch_logs
from harness.dispatch.base import Task
from harness.dispatch.slurm.queue import call
from harness.record.control import Control
from harness.record.jobs import SchedulerUnavailable
from harness.record.journal import Event, Journal, Progress, read_progress
from harness.record.root import Root, read_launch, read_model
from harness.record.series import count_crashes, place, unfinished
from harness.train.stopping import ANOTHER_RANKS_SIGNAL, EXIT_NO_SPACE, EXIT_PREEMPTED, MOST_ATTEMPTS, STOPPED
from ssmttm.errors import InputError

log = logging.getLogger("ssmscale.slurm")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one element of an array; returns the job's exit status."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    (array_file,) = arguments if arguments is not None else sys.argv[1:]
    # What SLURM sends is for the ranks: this process has to be there when they have saved.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGCONT):
        signal.signal(number, lambda number, _: log.info("%s", signal.Signals(number).name))
    try:
        array = read_model(Path(array_file), Array)
        if array.is_void:
            log.info("the submission of this job was given up; others train its series")
            return 0
        task = array.tasks[int(os.environ["SLURM_ARRAY_TASK_ID"])]
        before = place(Root(task.run_dirs[0].parent.parent), task.series_id, task.run_dirs)
        began = time.time()
        code = _run_ranks(array, task, Path(array_file).parent.parent)
        return settle(task, code, began, before)
    except InputError as error:
        log.error("%s", error)
        return 2


def settle(task: Task, code: int, began: float, before: str) -> int:
    """Decide from the journals what becomes of the job whose ranks ended with `code`; returns its exit status.

    `began` is when the ranks were started, in seconds since 1970, and `before` the place the Series was at then.
    """
    root = Root(task.run_dirs[0].parent.parent)
    control = Control(read_launch(root, task.series_id).control)
    left = unfinished(task.run_dirs, control)
    if not left:
        states = [read_progress(folder).state for folder in task.run_dirs]
        return 1 if Event.FAILED in states else 0
    told = [read_progress(root.series(task.series_id)), *map(read_progress, left)]
    stopped = [reason for progress in told if (reason := _stopped_by(progress)) is not None]
    full = [reason for reason in stopped if not (_is_a_signal(reason) or reason.startswith(STOPPED))]
    if code == EXIT_NO_SPACE or (full and code not in {0, EXIT_PREEMPTED}):
        # Of several ranks some are killed because one left, and their status is srun's.
        log.error(
            "%s; submit again when that has changed", full[0] if full else f"{root.path}: takes no more"
        )
        return EXIT_NO_SPACE
    job_id = job_number()
    job = look_up(job_id)
    if job.starts_again > int(os.environ.get("SLURM_RESTART_COUNT", "0")):
        log.info("job %s was started again elsewhere", job_id)
        return EXIT_PREEMPTED
    if not job.is_wanted:
        log.info("job %s was cancelled", job_id)
        return EXIT_PREEMPTED
    now_at = place(root, task.series_id, task.run_dirs)
    # What stopped an earlier start is told by the journals until a later one begins to train.
    now = {_stopped_by(progress) for progress in told if progress.spans and progress.spans[-1].ended >= began}
    smaller = any((reason or "").startswith(STOPPED) for reason in now)  # the next start's micro-batch is
    out_of_time = "SIGUSR2" in now and "SIGTERM" not in now and not job.makes_room
    in_vain = code in {0, EXIT_PREEMPTED} and out_of_time and now_at == before
    if smaller or (stopped and code in {0, EXIT_PREEMPTED} and not in_vain):
        requeue(job_id)
        return EXIT_PREEMPTED
    if code in {0, EXIT_PREEMPTED} and not in_vain:
        log.info("another process trains the series")
        return EXIT_PREEMPTED
    last = _last_words(root.series(task.series_id) / "logs", control.path.parent, began)
    control.append("crashed", runs=[folder.name for folder in left], job_id=job_id, kind=now_at, reason=last)
    if count_crashes(control, left, now_at) < MOST_ATTEMPTS:
        requeue(job_id)
        return EXIT_PREEMPTED
    why = f"ended {MOST_ATTEMPTS} times at the same place; its log ends: {last}"
    if in_vain:
        why = f"ended {MOST_ATTEMPTS} times at the same place, the last time because its time was over"
    reason = f"its job {job_id} {why}"
    for folder in left:
        with Journal.open(folder) as journal:
            journal.append(Event.FAILED, reason=reason, kind="lost")
    return 1


def _run_ranks(array: Array, task: Task, study_dir: Path) -> int:
    """Start the ranks with srun and wait for them; returns srun's exit status."""
    shape = array.shape
    meeting = study_dir / "meetings" / f"{job_number()}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    make_folder(meeting)
    command = [
        "srun",
        "--unbuffered",
        "--kill-on-bad-exit=1",
        f"--nodes={shape.nodes}",
        f"--ntasks={shape.ranks}",
        f"--ntasks-per-node={shape.ranks_a_node}",
        f"--cpus-per-task={shape.threads}",
        sys.executable,
        "-u",
        "-m",
        "harness.train.worker",
        "--supervised",
        *(str(folder) for folder in task.run_dirs),
    ]
    environment = {
        **os.environ,
        "SSMSCALE_MEETING": str(meeting),
        "OMP_NUM_THREADS": str(shape.threads),
        "MKL_NUM_THREADS": str(shape.threads),
    }
    log.info("series %s: %d ranks on %s", task.series_id, shape.ranks, os.environ.get("SLURM_JOB_NODELIST"))
    with subprocess.Popen(command, env=environment, start_new_session=True) as ranks:
        return ranks.wait()


def _stopped_by(progress: Progress) -> str | None:
    if progress.state != Event.PREEMPTED:
        return None
    return progress.stopped_by or ""


def _is_a_signal(reason: str) -> bool:
    return reason in signal.Signals.__members__ or reason == ANOTHER_RANKS_SIGNAL


def _last_words(logs: Path, study_dir: Path, began: float) -> str:
    """The last thing a rank said since `began`, in its own log or, where it did not get so far, in the job's."""
    told = [path for path in logs.glob("rank-*.log") if path.stat().st_mtime >= began]
    newest = max(told, key=lambda path: path.stat().st_mtime, default=None)
    for path in [newest] if newest else batch_logs(study_dir, job_number()):
        lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
        own = [line for line in lines if line and not line.startswith(("srun: ", "slurmstepd"))]
        if own or lines:
            return (own or lines)[-1][:300]
    return "nothing"


def job_number() -> str:
    """SLURM's number of this job, that of an array's element."""
    return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"


@dataclass(frozen=True)
class JobWord:
    """What SLURM says of this very job."""

    is_wanted: bool
    """Whether nobody cancelled it: it runs, or SLURM ends it for its time or to make room for another."""
    makes_room: bool
    """Whether SLURM ends it for another job, which says nothing about how far it came."""
    starts_again: int
    """How often it has been requeued; the batch script on a node thought dead may be older."""


def look_up(job_id: str) -> JobWord:
    """Ask SLURM about a job; raises SchedulerUnavailable where it has not answered for minutes."""
    said = patiently("scontrol", "--oneliner", "show", "job", job_id)
    facts = dict(re.findall(r"\b(JobState|Reason|PreemptTime|Restarts)=(\S+)", said))
    preempted = facts.get("PreemptTime", "None") not in {"None", "Unknown", "N/A"}
    # A job that is being ended is COMPLETING, whatever ends it.
    is_wanted = preempted or facts.get("JobState") == "RUNNING" or facts.get("Reason") == "TimeLimit"
    return JobWord(is_wanted, preempted, int(facts.get("Restarts", 0)))


def requeue(job_id: str) -> None:
    """Have SLURM start this job again under its own number; a slurmctld that is away is waited for."""
    log.info("requeueing job %s", job_id)
    patiently("scontrol", "requeue", job_id)


def patiently(*command: str) -> str:
    """What one of SLURM's programs prints; raises SchedulerUnavailable where SLURM has not answered for minutes."""
    patience = Retrying(
        retry=retry_if_exception_type(SchedulerUnavailable),
        wait=wait_exponential_jitter(initial=1, max=20),
        stop=stop_after_delay(300),
        before_sleep=before_sleep_log(log, logging.WARNING),
        reraise=True,
    )
    return str(patience(call, *command))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except DiskFull as error:
        log.error("%s", error)
        sys.exit(EXIT_NO_SPACE)
