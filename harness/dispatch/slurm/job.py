"""The command of a SLURM job's batch script: start the ranks, wait for them, and requeue the job if Runs are left.

    python -m harness.dispatch.slurm.job ARRAY_FILE DIGEST      inside a job, whose array index selects the Series
    python -m harness.dispatch.slurm.job --setup-ended ARRAY_FILE DIGEST      if a setup line ends the batch script

The ranks save by themselves when they are told to stop. The journals, never exit codes alone, tell how their Runs
ended; harness.dispatch.slurm.settle decides whether the job is requeued. If a line of the logs tells of a
node's failure, the node is remembered, and the job goes elsewhere.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness.common.limits import oom_kills
from harness.common.process import read_end
from harness.dispatch.arrays import Array, batch_logs
from harness.dispatch.base import Task
from harness.dispatch.slurm.queue import call, environment_of_srun
from harness.dispatch.slurm.settle import OUT_OF_TIME, Ending, JobStart, hostnames, job_number, run_job
from harness.dispatch.supervise import KILLED, begin_smaller
from harness.plan.container import contained
from harness.record.control import Control
from harness.record.heartbeat import Watch, read_beats
from harness.record.jobs import SchedulerUnavailable
from harness.record.journal import Event, Progress
from harness.record.kinds import TIME_LIMIT_SIGNAL, Kind
from harness.record.nodes import node_failure_in, remember_node
from harness.record.series import JoinRequest
from harness.train.meeting import make_meeting
from harness.train.stopping import (
    EXIT_NO_SPACE,
    EXIT_OUT_OF_MEMORY,
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
STARTS = "srun starts"
"""Words of the line after which a job's log belongs to its newest start."""
SCHEDULER_ERROR = re.compile(r"(srun|slurmstepd)[^:]*: (error|fatal): ")
OUT_OF_MEMORY = re.compile(
    r"(srun|slurmstepd).*(oom.kill|Out Of Memory|exceeded .*memory limit)", re.IGNORECASE
)
"""SLURM's errors that report the end of a rank for memory."""
CONSEQUENCE = re.compile(
    r"[Ee]xited with exit code|task \S+: ([A-Z][a-z]+|User defined signal \d|Segmentation fault)( \(core dumped\))?$"
    r"|\*\*\* (STEP|JOB) (?!.*DUE TO (TIME|NODE))|Timed out waiting for job step"
)
"""Errors by which SLURM reports that a rank has ended, or that it ends the others."""
SETUP_ENDED = "--setup-ended"
START_MARK, RANKS_MARK = "ssmscale: start", "ssmscale: setup done"
"""Beginning of the lines that the batch script prints before its setup lines, and after them."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one element of an array; returns the job's exit status."""
    # SLURM's signals are for the ranks: this process has to outlive them.
    for number in (*STOP_SIGNALS, signal.SIGCONT):
        signal.signal(number, lambda number, _: log.info("%s", signal.Signals(number).name))
    words = list(arguments if arguments is not None else sys.argv[1:])
    if words[0] == SETUP_ENDED:
        return run_job(words[1:], _after_setup)
    return run_job(words, _train)


def _after_setup(array_file: Path, array: Array) -> int:
    """Have a job whose setup lines ended it go elsewhere if they tell of a bad node; returns an exit status."""
    tasks = array.tasks if array.packed else (array.tasks[int(os.environ["SLURM_ARRAY_TASK_ID"])],)
    control = Control(array_file.parent.parent / "control.jsonl")
    start = JobStart(job_number(), tasks[0].root, control, tasks, is_packed=array.packed, array=array.name)
    if not start.unfinished() or not _remember_bad_node(start, None):
        return 1
    return start.settle(Ending.BAD_NODE, start.place(), lambda _: False)


def _train(array_file: Path, array: Array) -> int:
    task = array.tasks[int(os.environ["SLURM_ARRAY_TASK_ID"])]
    start = start_of(task, array_file.parent.parent, array.name)
    while True:
        before, began, known = start.place(), time.time(), start.requests()
        kills, logs = oom_kills(), rank_logs(task)
        code, stall = _run_ranks(array, task, array_file.parent.parent)
        if code == 128 + signal.SIGKILL and stall is None and oom_kills() > kills:
            code = EXIT_OUT_OF_MEMORY
        if stall is not None:
            task.note_stall(stall)
        if stall is not None or not has_more(start, code, began, known):
            a_node = array.shape.ranks_a_node
            return settle(start, code, began, before, stall, logs=logs, ranks_a_node=a_node)


def start_of(task: Task, study_dir: Path, array: str = "") -> JobStart:
    """Return this start of the job, which runs one task of an array of the study of that directory."""
    return JobStart(job_number(), task.root, task.control_of(study_dir), (task,), array=array)


def has_more(start: JobStart, code: int, began: float, known: Sequence[JoinRequest]) -> bool:
    """True if the ranks ended in order and Runs have joined since, which this start trains too.

    `known` are the Runs that had joined when the ranks were started. Without others the work on the Series is closed.
    """
    if _ending(start.progress(), code, began) is not Ending.OTHERS_TRAIN:
        return False
    if not start.unfinished():
        return not start.close()
    return start.requests() != known


def rank_logs(task: Task) -> dict[Path, int]:
    """Return the length of each log of the ranks of a task's Series."""
    return {path: path.stat().st_size for path in (task.folder / "logs").glob("rank-*.log")}


def settle(
    start: JobStart,
    code: int,
    began: float,
    before: str,
    stall: str | None = None,
    *,
    logs: Mapping[Path, int] | None = None,
    ranks_a_node: int = 1,
) -> int:
    """Requeue the job whose ranks ended with `code`, or let it end; returns its exit status.

    `began` is the time when the ranks were started, in seconds since 1970, `before` the place of the Series then, and
    `logs` are the lengths of its logs. `stall` describes where the ranks stood still, if they were ended for that.
    """
    ending = _ending(start.progress(), code, began)
    if ending is Ending.CRASHED:
        reason, _ = _why(start, began)
        if OUT_OF_MEMORY.search(reason) or code == EXIT_OUT_OF_MEMORY:
            how = reason if OUT_OF_MEMORY.search(reason) else KILLED
            if begin_smaller(start.tasks[0], start.control, began, how):
                ending = Ending.STOPPED
        elif stall is None and _remember_bad_node(start, logs, ranks_a_node):
            ending = Ending.BAD_NODE

    def may_start_again(ending: Ending) -> bool:
        reason, why = (stall, f"; {stall}") if stall else _why(start, began)
        if ending is Ending.OUT_OF_TIME:
            reason, why = OUT_OF_TIME, f", the last time because {OUT_OF_TIME}"
        return start.may_start_again(reason, f"ended {MOST_ATTEMPTS} times at the same place{why}")

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
    if code - 128 == signal.Signals[TIME_LIMIT_SIGNAL]:  # a rank that is still starting does not handle it
        return Ending.OUT_OF_TIME
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
    srun = [
        "srun",
        "--unbuffered",
        "--kill-on-bad-exit=1",
        f"--nodes={shape.nodes}",
        f"--ntasks={shape.ranks}",
        f"--ntasks-per-node={shape.ranks_a_node}",
        f"--cpus-per-task={shape.threads}",
        "--export=ALL",
    ]
    command = contained(array.container, srun, [*task.command, "--supervised"], [*task.paths, study_dir])
    threads = str(shape.threads)
    environment = environment_of_srun(
        SSMSCALE_MEETING=str(meeting), OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads
    )
    log.info(
        "%s: %s %d ranks on %s",
        task.title,
        STARTS,
        shape.ranks,
        os.environ.get("SLURM_JOB_NODELIST"),
    )
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


def _why(start: JobStart, began: float) -> tuple[str, str]:
    """Return why the ranks that were started at `began` have ended, alone and as the end of a sentence.

    An error of SLURM's is the reason unless it follows from a rank's end, else the last line that a rank logged or
    printed.
    """
    said = [line for path in batch_logs(start.control.path.parent, start.job_id) for line in _lines(path)]
    begins = [number for number, line in enumerate(said) if STARTS in line]
    said = said[begins[-1] + 1 :] if begins else said
    errors = [line for line in said if SCHEDULER_ERROR.match(line)]
    causes = [line for line in errors if not CONSEQUENCE.search(line)]
    if causes:
        return causes[-1], f"; SLURM said: {causes[-1]}"
    logs = (start.tasks[0].folder / "logs").glob("rank-*.log")
    recent = [path for path in logs if path.stat().st_mtime >= began]
    printed = _lines(max(recent, key=lambda path: path.stat().st_mtime)) if recent else []
    own = printed or [line for line in said if not line.startswith(("srun: ", "slurmstepd"))]
    last = next(reversed(own or errors), "nothing")
    return last, f"; its log ends: {last}"


def _remember_bad_node(start: JobStart, logs: Mapping[Path, int] | None, ranks_a_node: int = 1) -> bool:
    """Remember the node of whose failure the logs of this start tell; False if they tell of none.

    `logs` are the lengths of the ranks' logs when the ranks were started; None if none was.
    """
    nodes = hostnames(os.environ.get("SLURM_JOB_NODELIST", ""))
    found = None if logs is None else _told_by_ranks(start.tasks[0], logs, nodes, ranks_a_node)
    found = found or _told_by_job(start, nodes)
    if found is None:
        return False
    node, line = found
    log.error("node %s has failed, and not the run: %s", node, line)
    remember_node(start.control, node, line, [folder.name for folder in start.unfinished()], start.job_id)
    return True


def _told_by_ranks(
    task: Task, logs: Mapping[Path, int], nodes: Sequence[str], ranks_a_node: int
) -> tuple[str, str] | None:
    """Return the node on which a rank logged a failure of its node, and the line."""
    for path in sorted((task.folder / "logs").glob("rank-*.log")):
        place = int(path.stem.partition("-")[2]) // ranks_a_node
        line = node_failure_in(read_end(path, logs.get(path, 0)))
        if line is not None and place < len(nodes):
            return _named_in(line, nodes) or nodes[place], line
    return None


def _told_by_job(start: JobStart, nodes: Sequence[str]) -> tuple[str, str] | None:
    """Return the node of whose failure the batch script's log tells since this start, and the line."""
    text = "".join(read_end(path) for path in batch_logs(start.control.path.parent, start.job_id))
    setup, _, later = text.rpartition(START_MARK)[2].partition(RANKS_MARK)
    if (line := node_failure_in(setup)) is not None:
        return _named_in(line, nodes) or os.environ.get("SLURMD_NODENAME", nodes[0]), line
    if (line := node_failure_in(later)) is None:
        return None
    # Of several nodes srun names the one whose rank ended.
    ended = re.findall(r"^srun: error: (\S+?): tasks? ", later, re.MULTILINE)
    named = _named_in(line, nodes) or next((node for node in ended if node in nodes), None)
    if named is None and len(nodes) > 1:
        return None
    return named or nodes[0], line


def _named_in(line: str, nodes: Sequence[str]) -> str | None:
    return next((node for node in nodes if re.search(rf"(?<![\w.-]){re.escape(node)}(?![\w-])", line)), None)


def _lines(path: Path) -> list[str]:
    """Return the last lines of a log that are not blank, each cut at 300 characters."""
    return [line.strip()[:300] for line in read_end(path).splitlines() if line.strip()]


if __name__ == "__main__":
    sys.exit(main())
