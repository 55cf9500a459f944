"""The command of a SLURM job's batch script: start the ranks, wait for them, and requeue the job if Runs are left.

    python -m harness.dispatch.slurm.job ARRAY_FILE DIGEST      inside a job, whose array index selects the Series

The ranks save by themselves when they are told to stop. The journals, never exit codes alone, tell how their Runs
ended; harness.dispatch.slurm.settle decides whether the job is requeued.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness.dispatch.arrays import Array, batch_logs
from harness.dispatch.base import Task
from harness.dispatch.slurm.queue import call
from harness.dispatch.slurm.settle import Ending, JobStart, job_number, run_job
from harness.record.control import Control
from harness.record.heartbeat import Watch, read_beats
from harness.record.jobs import SchedulerUnavailable
from harness.record.journal import Event, Progress
from harness.record.kinds import Kind
from harness.record.root import read_launch
from harness.record.series import JoinRequest
from harness.train.meeting import make_meeting
from harness.train.stopping import (
    EXIT_NO_SPACE,
    EXIT_PREEMPTED,
    MOST_ATTEMPTS,
    STACK_SECONDS,
    STACK_SIGNAL,
    STOP_SIGNALS,
)

log = logging.getLogger("ssmscale.slurm")

LOOK_SECONDS = 1.0
"""Interval between two looks at the ranks' heartbeats."""
END_SECONDS = 60.0
"""Time for killed ranks to end before they are killed again."""
TAIL = 2**16
"""Bytes read of the end of a log."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one element of an array; returns the job's exit status."""
    # SLURM's signals are for the ranks: this process has to outlive them.
    for number in (*STOP_SIGNALS, signal.SIGCONT):
        signal.signal(number, lambda number, _: log.info("%s", signal.Signals(number).name))
    return run_job(arguments, _train)


def _train(array_file: Path, array: Array) -> int:
    task = array.tasks[int(os.environ["SLURM_ARRAY_TASK_ID"])]
    start = start_of(task, array.name)
    while True:
        before, began, known = start.place(), time.time(), start.requests()
        code, stall = _run_ranks(array, task, array_file.parent.parent)
        if stall is not None:
            task.note_stall(stall)
        if stall is not None or not has_more(start, code, began, known):
            return settle(start, code, began, before, stall)


def start_of(task: Task, array: str = "") -> JobStart:
    """Return this start of the job, which trains one task of an array."""
    control = Control(read_launch(task.root, task.series_id).control)
    return JobStart(job_number(), task.root, control, (task,), array=array)


def has_more(start: JobStart, code: int, began: float, known: Sequence[JoinRequest]) -> bool:
    """True if the ranks ended in order and Runs have joined since, which this start trains too.

    `known` are the Runs that had joined when the ranks were started. Without others the work on the Series is closed.
    """
    if _ending(start.progress(), code, began) is not Ending.OTHERS_TRAIN:
        return False
    if not start.unfinished():
        return not start.close()
    return start.requests() != known


def settle(start: JobStart, code: int, began: float, before: str, stall: str | None = None) -> int:
    """Requeue the job whose ranks ended with `code`, or let it end; returns its exit status.

    `began` is the time when the ranks were started, in seconds since 1970, and `before` the place of the Series then.
    `stall` describes where they stood still, if they were ended for that.
    """
    ending = _ending(start.progress(), code, began)

    def may_start_again() -> bool:
        last = stall or _last_output(start, began)
        if ending is Ending.OUT_OF_TIME:
            why = "at the same place, the last time because its time was over"
        else:
            why = f"at the same place; {last if stall else f'its log ends: {last}'}"
        return start.may_start_again(last, f"ended {MOST_ATTEMPTS} times {why}")

    return start.settle(ending, before, may_start_again)


def _ending(told: Sequence[Progress], code: int, began: float) -> Ending:
    """Classify the end of the ranks by their journals and by srun's exit status."""
    stopped = [progress for progress in told if progress.state == Event.PREEMPTED]
    # When one of several ranks ends srun kills the others, and returns their status.
    is_in_order = code in {0, EXIT_PREEMPTED}
    is_full = any(progress.kind is Kind.DISK_FULL for progress in stopped)
    if code == EXIT_NO_SPACE or (is_full and not is_in_order):
        return Ending.DISK_FULL
    # Until this start trains, a journal still tells what stopped an earlier one.
    now = {progress.kind for progress in stopped if progress.spans and progress.spans[-1].ended >= began}
    if Kind.OUT_OF_MEMORY in now:  # the next start has a smaller micro-batch
        return Ending.STOPPED
    if not is_in_order:
        return Ending.CRASHED
    if not stopped:
        return Ending.OTHERS_TRAIN
    return Ending.OUT_OF_TIME if Kind.TIME_LIMIT in now and Kind.SIGNAL not in now else Ending.STOPPED


def _run_ranks(array: Array, task: Task, study_dir: Path) -> tuple[int, str | None]:
    """Run the ranks with srun; returns its exit status, and the description of a stall for which they were ended."""
    shape = array.shape
    meeting = study_dir / "meetings" / f"{job_number()}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    make_meeting(meeting)
    command = [
        "srun",
        "--unbuffered",
        "--kill-on-bad-exit=1",
        f"--nodes={shape.nodes}",
        f"--ntasks={shape.ranks}",
        f"--ntasks-per-node={shape.ranks_a_node}",
        f"--cpus-per-task={shape.threads}",
        *task.command,
        "--supervised",
    ]
    environment = {
        **os.environ,
        "SSMSCALE_MEETING": str(meeting),
        "OMP_NUM_THREADS": str(shape.threads),
        "MKL_NUM_THREADS": str(shape.threads),
    }
    log.info("series %s: %d ranks on %s", task.series_id, shape.ranks, os.environ.get("SLURM_JOB_NODELIST"))
    try:
        return _watch_over(command, environment, task)
    finally:
        shutil.rmtree(meeting, ignore_errors=True)


def _watch_over(command: Sequence[str], environment: Mapping[str, str], task: Task) -> tuple[int, str | None]:
    """Run the ranks until they end, or nothing moves; returns the exit status, and the sentence about a stall."""
    watch, stall = Watch(task.stall_seconds, read_beats(task.folder)), None
    with subprocess.Popen(command, env=environment, start_new_session=True) as ranks:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return ranks.wait(LOOK_SECONDS), stall
            if found := watch.look(read_beats(task.folder)):
                log.error("%s: the ranks are ended, and their logs show where each was", found)
                stall = found if _end_ranks() else None
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return ranks.wait(END_SECONDS), stall


def _end_ranks() -> bool:
    """Kill the ranks on all nodes, after they have written their stacks; returns False if SLURM does not answer."""
    step = f"{os.environ['SLURM_JOB_ID']}.0"  # this process would receive a signal to the whole job
    try:
        for number in (STACK_SIGNAL, signal.SIGCONT, signal.SIGKILL):
            call("scancel", f"--signal={number.name.removeprefix('SIG')}", step)
            time.sleep(STACK_SECONDS)
    except SchedulerUnavailable as gone:
        log.warning("SLURM: %s", gone)
        return False
    return True


def _last_output(start: JobStart, began: float) -> str:
    """Return the last line that a rank logged since `began`, or without one the last line of the job's log."""
    logs = (start.tasks[0].folder / "logs").glob("rank-*.log")
    recent = [path for path in logs if path.stat().st_mtime >= began]
    newest = max(recent, key=lambda path: path.stat().st_mtime, default=None)
    for path in [newest] if newest else batch_logs(start.control.path.parent, start.job_id):
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
        own = [line for line in lines if line and not line.startswith(("srun: ", "slurmstepd"))]
        if own or lines:
            return (own or lines)[-1][:300]
    return "nothing"


if __name__ == "__main__":
    sys.exit(main())
