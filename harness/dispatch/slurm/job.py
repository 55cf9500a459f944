"""The command of a SLURM job's batch script: start the ranks, wait for them, and requeue the job if Runs are left.

    python -m harness.dispatch.slurm.job ARRAY_FILE DIGEST      inside a job, whose array index selects the Series
    python -m harness.dispatch.slurm.job --setup-ended ARRAY_FILE DIGEST      if a setup line ends the batch script

The ranks save by themselves when they are told to stop. The journals, never exit codes alone, tell how their Runs
ended; harness.dispatch.slurm.settle decides whether the job is requeued. If a line of the logs tells of a
node's failure, the node is remembered, and the job goes elsewhere.
"""

from __future__ import annotations

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

from harness.common.process import read_end
from harness.dispatch.arrays import Array, batch_logs
from harness.dispatch.base import Task
from harness.dispatch.slurm.settle import Ending, JobStart, hostnames, job_number, run_job
from harness.record.control import Control
from harness.record.journal import Event, Progress
from harness.record.kinds import Kind
from harness.record.nodes import node_failure_in, remember_node
from harness.record.root import read_launch
from harness.train.meeting import make_meeting
from harness.train.stopping import EXIT_NO_SPACE, EXIT_PREEMPTED, MOST_ATTEMPTS, STOP_SIGNALS

log = logging.getLogger("ssmscale.slurm")

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
    start = JobStart(job_number(), tasks[0].root, control, tasks, is_packed=array.packed)
    if not start.unfinished() or not _remember_bad_node(start, None):
        return 1
    return start.settle(Ending.BAD_NODE, start.place(), lambda: False)


def _train(array_file: Path, array: Array) -> int:
    task = array.tasks[int(os.environ["SLURM_ARRAY_TASK_ID"])]
    start = start_of(task)
    before, began, logs = start.place(), time.time(), rank_logs(task)
    code = _run_ranks(array, task, array_file.parent.parent)
    return settle(start, code, began, before, logs, array.shape.ranks_a_node)


def start_of(task: Task) -> JobStart:
    """Return this start of the job, which trains one task."""
    control = Control(read_launch(task.root, task.series_id).control)
    return JobStart(job_number(), task.root, control, (task,))


def rank_logs(task: Task) -> dict[Path, int]:
    """Return the length of each log of the ranks of a task's Series."""
    return {path: path.stat().st_size for path in (task.folder / "logs").glob("rank-*.log")}


def settle(
    start: JobStart,
    code: int,
    began: float,
    before: str,
    logs: Mapping[Path, int] | None = None,
    ranks_a_node: int = 1,
) -> int:
    """Requeue the job whose ranks ended with `code`, or let it end; returns its exit status.

    `began` is the time when the ranks were started, in seconds since 1970, `before` the place of the Series then, and
    `logs` are the lengths of its logs.
    """
    ending = _ending(start.progress(), code, began)
    if ending is Ending.CRASHED and _remember_bad_node(start, logs, ranks_a_node):
        ending = Ending.BAD_NODE

    def may_start_again() -> bool:
        last = _last_output(start, began)
        if ending is Ending.OUT_OF_TIME:
            why = "at the same place, the last time because its time was over"
        else:
            why = f"at the same place; its log ends: {last}"
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


def _run_ranks(array: Array, task: Task, study_dir: Path) -> int:
    """Run the ranks with srun; returns its exit status."""
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
    with subprocess.Popen(command, env=environment, start_new_session=True) as ranks:
        code = ranks.wait()
    shutil.rmtree(meeting, ignore_errors=True)
    return code


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


def _last_output(start: JobStart, began: float) -> str:
    """Return the last line that a rank logged since `began`, or without one the last line of the job's log."""
    logs = (start.tasks[0].folder / "logs").glob("rank-*.log")
    recent = [path for path in logs if path.stat().st_mtime >= began]
    newest = max(recent, key=lambda path: path.stat().st_mtime, default=None)
    for path in [newest] if newest else batch_logs(start.control.path.parent, start.job_id):
        lines = [line.strip() for line in read_end(path).splitlines()]
        own = [line for line in lines if line and not line.startswith(("srun: ", "slurmstepd", START_MARK))]
        if own or lines:
            return (own or lines)[-1][:300]
    return "nothing"


if __name__ == "__main__":
    sys.exit(main())
