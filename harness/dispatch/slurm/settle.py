"""Decide whether a SLURM job whose ranks, or whose controller, have ended is over, requeued or given up.

The journals tell how far its Runs came, and SLURM tells whether the job was cancelled. A job that was told to stop, or
whose time is over, is requeued under its own number. So is a job that crashes, or whose time ends before it made any
progress, until that has happened several times at the same place.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from itertools import chain
from pathlib import Path

from tenacity import (
    Retrying,
    before_sleep_log,
    retry_if_exception_type,
    stop_after_delay,
    wait_exponential_jitter,
)

from harness.common.disk import DiskFull
from harness.common.process import log_to_stderr
from harness.dispatch.arrays import Array, read_array
from harness.dispatch.base import Task, close_work
from harness.dispatch.slurm.queue import call
from harness.record.control import Control
from harness.record.jobs import SchedulerUnavailable
from harness.record.journal import Event, Progress, read_progress
from harness.record.kinds import Kind
from harness.record.nodes import MOST_BAD_NODES, bad_nodes_in, nodes_met_in
from harness.record.root import Root
from harness.record.series import JoinRequest, count_crashes, study_of, unfinished
from harness.train.stopping import EXIT_NO_SPACE, EXIT_PREEMPTED, MOST_ATTEMPTS, exit_status

log = logging.getLogger("ssmscale.slurm")

FACTS = r"\b(JobState|Reason|PreemptTime|Restarts|Partition|NumNodes|ExcNodeList)=(\S+)"
"""Facts of `scontrol show job` that decide on another start."""


def run_job(arguments: Sequence[str] | None, train: Callable[[Path, Array], int]) -> int:
    """Train the array whose file a job's command names; returns the job's exit status."""
    log_to_stderr()
    name, *digest = arguments if arguments is not None else sys.argv[1:]
    array_file = Path(name).absolute()

    def run() -> int:
        array = read_array(array_file, digest[0] if digest else None)
        if array.is_void:
            log.info("the submission of this job was given up; other jobs train its series")
            return 0
        return train(array_file, array)

    return exit_status(run, log)


OUT_OF_TIME = "its time limit was reached; raise limits.hours or the partition's hours in the profile"
"""Reason why a job failed whose time is too short for any progress."""


class Ending(Enum):
    """The end of a job's start that has unfinished Runs."""

    DISK_FULL = auto()
    OTHERS_TRAIN = auto()
    """It was not told to stop: other processes train its Series."""
    STOPPED = auto()
    """It was told to stop, or continues with a smaller micro-batch: to be requeued."""
    OUT_OF_TIME = auto()
    """Its time was over: to be requeued if it made progress."""
    CRASHED = auto()
    BAD_NODE = auto()
    """A node failed, which control.jsonl remembers: to be requeued on others."""


@dataclass(frozen=True)
class JobStart:
    """One start of a SLURM job and the tasks it trains."""

    job_id: str
    root: Root
    control: Control
    tasks: Sequence[Task]
    is_packed: bool = False
    """True if it packs all tasks on a Ray of its own."""
    array: str = ""
    """Name of its array."""

    @property
    def run_dirs(self) -> list[Path]:
        """Folders of all Runs."""
        return [folder for task in self.tasks for folder in task.run_dirs]

    def unfinished(self) -> list[Path]:
        """Return the folders of the unfinished Runs, with those that joined."""
        joined = chain.from_iterable(task.work().joined() for task in self.tasks)
        return list(dict.fromkeys([*unfinished(self.run_dirs, self.control), *joined]))

    def requests(self) -> list[JoinRequest]:
        """Return the Runs that joined its work, without its own: their workers add them to the work of others."""
        study, own = study_of(self.root, self.control.path), {folder.name for folder in self.run_dirs}
        requests = chain.from_iterable(task.work().requests() for task in self.tasks)
        return [request for request in requests if request.study != study or request.run_id not in own]

    def close(self, *, by_force: bool = False) -> bool:
        """End its work on its Series; return False if Runs that joined are left, unless `by_force`."""
        return close_work(self.array, self.tasks, by_force=by_force)

    def progress(self) -> list[Progress]:
        """Read the journals of the Series and of the unfinished Runs."""
        series = [task.folder for task in self.tasks]
        return [read_progress(folder) for folder in (*series, *self.unfinished())]

    def place(self) -> str:
        """Describe the checkpoints of its Series."""
        places = [task.place() for task in self.tasks]
        if not self.is_packed:
            return places[0]
        done = sum(read_progress(folder).state == Event.FINISHED for folder in self.run_dirs)
        return f"{done} finished, checkpoints {hashlib.sha256('|'.join(places).encode()).hexdigest()[:12]}"

    def settle(self, ending: Ending, before: str, may_start_again: Callable[[Ending], bool]) -> int:
        """Requeue the job, or let it end and close the work lists of its Series; returns its exit status.

        `before` is its `place` when it started. If it made no progress since, `may_start_again` is called with the
        ending that SLURM confirms: it is the method of this name with its arguments.
        """
        left = self.unfinished()
        if not left and not self.close():  # a Run has joined just now
            left, ending = self.unfinished(), Ending.STOPPED
        if not left:
            states = [read_progress(folder).state for folder in self.run_dirs]
            return 1 if Event.FAILED in states else 0
        if ending is Ending.DISK_FULL:
            told = [found.stopped_by for found in self.progress() if found.kind is Kind.DISK_FULL]
            problem = told[0] if told else f"{self.root.path}: the disk is full"
            log.error("%s; submit again when there is room", problem)
            with contextlib.suppress(DiskFull):
                self.close(by_force=True)
            return EXIT_NO_SPACE
        if ending is Ending.OTHERS_TRAIN:
            log.info("%d runs are left: other processes train them", len(left))
            self.close(by_force=True)
            return EXIT_PREEMPTED
        answer = patiently("scontrol", "--oneliner", "show", "job", self.job_id)
        facts = dict(re.findall(FACTS, answer))
        # SLURM may have taken this node for dead.
        if int(facts.get("Restarts", 0)) > int(os.environ.get("SLURM_RESTART_COUNT", "0")):
            log.info("job %s was started again elsewhere", self.job_id)
            return EXIT_PREEMPTED
        # A preempted job ends in favour of another one, however far it came.
        is_preempted = facts.get("PreemptTime", "None") not in {"None", "Unknown", "N/A"}
        # While a job is being ended its state is COMPLETING, for whatever reason.
        is_out_of_time = facts.get("Reason") == "TimeLimit"
        if not (is_preempted or is_out_of_time or facts.get("JobState") == "RUNNING"):
            log.info("job %s was cancelled", self.job_id)
            self.close(by_force=True)
            return EXIT_PREEMPTED
        if is_preempted and self.is_packed:
            log.info("SLURM preempts job %s and starts it again", self.job_id)
            return EXIT_PREEMPTED
        if ending is Ending.CRASHED and is_out_of_time:  # SLURM killed its ranks before they could save
            ending = Ending.OUT_OF_TIME
        if ending is Ending.BAD_NODE and not is_preempted:
            return self._go_elsewhere(facts)
        is_in_vain = ending is Ending.CRASHED or (
            ending is Ending.OUT_OF_TIME and not is_preempted and self.place() == before
        )
        if is_in_vain and not may_start_again(ending):
            self.close(by_force=True)
            return 1
        log.info("requeueing job %s", self.job_id)
        patiently("scontrol", "requeue", self.job_id)
        return EXIT_PREEMPTED

    def _go_elsewhere(self, facts: Mapping[str, str]) -> int:
        """Requeue the job on other nodes than those remembered as bad, or fail its Runs; returns its exit status."""
        events = self.control.read()
        bad = bad_nodes_in(events)
        held = hostnames(facts["ExcNodeList"]) if facts.get("ExcNodeList", "(null)") != "(null)" else []
        excluded = list(dict.fromkeys([*held, *bad]))
        partitions = facts["Partition"]
        answer = patiently("sinfo", "--noheader", "--Node", f"--partition={partitions}", "--format=%N")
        others = set(answer.split()) - set(excluded)
        wanted = int(facts["NumNodes"].partition("-")[0])
        for task in self.tasks:
            if not (left := task.left(self.control)):
                continue
            met = nodes_met_in(events, [folder.name for folder in left])
            named = "; ".join(str(bad[name]) for name in dict.fromkeys(met) if name in bad)
            if len(met) >= MOST_BAD_NODES:
                task.give_up(left, f"its job {self.job_id} met {len(met)} bad nodes: {named}")
            elif len(others) < wanted:
                why = f"partition {partitions} has too few nodes besides the bad ones"
                task.give_up(
                    left,
                    f"its job {self.job_id} met a bad node, and {why}: {', '.join(map(str, bad.values()))}",
                )
        if not self.unfinished():
            self.close(by_force=True)
            return 1
        avoiding = f"ExcNodeList={','.join(excluded)}"
        log.info("requeueing job %s on other nodes than %s", self.job_id, ", ".join(excluded))
        patiently("scontrol", "requeue", self.job_id)
        # SLURM takes a list of excluded nodes from waiting jobs alone.
        patiently("scontrol", "update", f"JobId={self.job_id}", avoiding)
        with contextlib.suppress(SchedulerUnavailable):  # the elements of its array that wait
            call("scontrol", "update", f"JobId={self.job_id.partition('_')[0]}", avoiding)
        return EXIT_PREEMPTED

    def may_start_again(self, reason: str, how: str) -> bool:
        """Record a start without progress; after several in a row fail the unfinished Runs and return False.

        control.jsonl gives the `reason`, and the journals of failed Runs say `how` the job ended.
        """
        left, now = self.unfinished(), self.place()
        names = [folder.name for folder in left]
        self.control.append("crashed", runs=names, job_id=self.job_id, kind=now, reason=reason)
        if not left or count_crashes(self.control, left, now) < MOST_ATTEMPTS:
            return True
        for task in self.tasks:
            task.give_up(task.left(self.control), f"its job {self.job_id} {how}")
        return False


def hostnames(nodes: str) -> list[str]:
    """Return the names in SLURM's list of nodes, such as n[1-3]."""
    return patiently("scontrol", "show", "hostnames", nodes).split() if set(nodes) & set("[,") else [nodes]


def job_number() -> str:
    """Return SLURM's id of this job, an array's element."""
    return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"


def patiently(*command: str) -> str:
    """Return the output of one of SLURM's programs; raises SchedulerUnavailable after minutes without an answer."""
    patience = Retrying(
        retry=retry_if_exception_type(SchedulerUnavailable),
        wait=wait_exponential_jitter(initial=1, max=20),
        stop=stop_after_delay(300),
        before_sleep=before_sleep_log(log, logging.WARNING),
        reraise=True,
    )
    return str(patience(call, *command))
