"""What becomes of a SLURM job whose ranks, or whose controller, have ended: over, started again, or given up.

The journals say how far its Runs came, and SLURM whether the job is still wanted. A job that was told to stop, or whose
time is over, is requeued under its own number; one that dies is requeued too, until it has died several times at the
same place, and so is one whose time is over before it has gained anything.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
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
from harness.dispatch.arrays import Array
from harness.dispatch.base import Task
from harness.dispatch.slurm.queue import call
from harness.record.control import Control
from harness.record.jobs import SchedulerUnavailable
from harness.record.journal import Event, Progress, read_progress
from harness.record.kinds import Kind
from harness.record.root import Root, read_model
from harness.record.series import count_crashes, unfinished
from harness.train.stopping import EXIT_NO_SPACE, EXIT_PREEMPTED, MOST_ATTEMPTS
from ssmttm.errors import InputError

log = logging.getLogger("ssmscale.slurm")


def run_job(arguments: Sequence[str] | None, train: Callable[[Path, Array], int]) -> int:
    """Do what a batch script is for with the array whose file it names; returns the job's exit status."""
    log_to_stderr()
    (name,) = arguments if arguments is not None else sys.argv[1:]
    array_file = Path(name).absolute()
    try:
        array = read_model(array_file, Array)
        if array.is_void:
            log.info("the submission of this job was given up; others train its series")
            return 0
        return train(array_file, array)
    except InputError as error:
        log.error("%s", error)
        return 2
    except DiskFull as error:
        log.error("%s", error)
        return EXIT_NO_SPACE


class Ending(Enum):
    """How a start of a job ended that has Runs left."""

    DISK_FULL = auto()
    OTHERS_TRAIN = auto()
    """Nothing told it to stop: other processes have its Series."""
    STOPPED = auto()
    """It was told to stop, or goes on with a smaller micro-batch: it is to be started again."""
    OUT_OF_TIME = auto()
    """Its time was over: it is to be started again where it has gained anything."""
    CRASHED = auto()


@dataclass(frozen=True)
class Crash:
    """What is written down of a start that ended in vain."""

    reason: str
    why: str
    """Why its Runs have failed, where it was the last of several; the job's number goes before it."""


@dataclass(frozen=True)
class JobStart:
    """One start of a SLURM job: what it trains, and where that stood before."""

    job_id: str
    root: Root
    control: Control
    tasks: Sequence[Task]
    is_packed: bool = False
    """Whether it holds a Ray on which all the tasks are packed."""

    @property
    def run_dirs(self) -> list[Path]:
        """The folders of all Runs."""
        return [folder for task in self.tasks for folder in task.run_dirs]

    def unfinished(self) -> list[Path]:
        """Return the folders of the Runs that are left."""
        return unfinished(self.run_dirs, self.control)

    def progress(self) -> list[Progress]:
        """Return what the journals of the Series say, and those of the Runs that are left."""
        series = [task.folder for task in self.tasks]
        return [read_progress(folder) for folder in (*series, *self.unfinished())]

    def place(self) -> str:
        """Return where its Series stand."""
        places = [task.place() for task in self.tasks]
        if not self.is_packed:
            return places[0]
        done = sum(read_progress(folder).state == Event.FINISHED for folder in self.run_dirs)
        return f"{done} finished, checkpoints {hashlib.sha256('|'.join(places).encode()).hexdigest()[:12]}"

    def settle(self, ending: Ending, before: str, crash: Callable[[], Crash]) -> int:
        """Decide what becomes of the job; returns its exit status. `before` is the place where its Series stood."""
        if not (left := self.unfinished()):
            states = [read_progress(folder).state for folder in self.run_dirs]
            return 1 if Event.FAILED in states else 0
        if ending is Ending.DISK_FULL:
            told = [found.stopped_by for found in self.progress() if found.kind is Kind.DISK_FULL]
            said = told[0] if told else f"{self.root.path}: takes no more"
            log.error("%s; submit again when that has changed", said)
            return EXIT_NO_SPACE
        if ending is Ending.OTHERS_TRAIN:
            log.info("%d runs are left: other processes train them", len(left))
            return EXIT_PREEMPTED
        job = look_up(self.job_id)
        if job.starts_again > int(os.environ.get("SLURM_RESTART_COUNT", "0")):
            log.info("job %s was started again elsewhere", self.job_id)
            return EXIT_PREEMPTED
        if not job.is_wanted:
            log.info("job %s was cancelled", self.job_id)
            return EXIT_PREEMPTED
        if job.makes_room and self.is_packed:
            log.info("job %s makes room for another; SLURM starts it again", self.job_id)
            return EXIT_PREEMPTED
        is_in_vain = ending is Ending.CRASHED or (
            ending is Ending.OUT_OF_TIME and not job.makes_room and self.place() == before
        )
        if is_in_vain and not self.may_start_again(crash()):
            return 1
        requeue(self.job_id)
        return EXIT_PREEMPTED

    def may_start_again(self, crash: Crash) -> bool:
        """Note that a start ended in vain; where that happened too often in a row, what is left has failed."""
        left, now = self.unfinished(), self.place()
        names = [folder.name for folder in left]
        self.control.append("crashed", runs=names, job_id=self.job_id, kind=now, reason=crash.reason)
        if not left or count_crashes(self.control, left, now) < MOST_ATTEMPTS:
            return True
        for task in self.tasks:
            task.give_up(task.left(self.control), f"its job {self.job_id} {crash.why}")
        return False


def job_number() -> str:
    """Return SLURM's number of this job, that of an array's element."""
    return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"


@dataclass(frozen=True)
class JobFacts:
    """What SLURM says of this very job."""

    is_wanted: bool
    """Whether nobody cancelled it: it runs, or SLURM ends it for its time or to make room for another."""
    makes_room: bool
    """Whether SLURM ends it for another job, which says nothing about how far it came."""
    starts_again: int
    """How often it has been requeued; the batch script on a node thought dead may be older."""


def look_up(job_id: str) -> JobFacts:
    """Ask SLURM about a job; raises SchedulerUnavailable where it has not answered for minutes."""
    said = patiently("scontrol", "--oneliner", "show", "job", job_id)
    facts = dict(re.findall(r"\b(JobState|Reason|PreemptTime|Restarts)=(\S+)", said))
    preempted = facts.get("PreemptTime", "None") not in {"None", "Unknown", "N/A"}
    # A job that is being ended is COMPLETING, whatever ends it.
    is_wanted = preempted or facts.get("JobState") == "RUNNING" or facts.get("Reason") == "TimeLimit"
    return JobFacts(is_wanted, preempted, int(facts.get("Restarts", 0)))


def requeue(job_id: str) -> None:
    """Have SLURM start this job again under its own number; a slurmctld that is away is waited for."""
    log.info("requeueing job %s", job_id)
    patiently("scontrol", "requeue", job_id)


def patiently(*command: str) -> str:
    """Return what one of SLURM's programs prints; raise SchedulerUnavailable after minutes of silence."""
    patience = Retrying(
        retry=retry_if_exception_type(SchedulerUnavailable),
        wait=wait_exponential_jitter(initial=1, max=20),
        stop=stop_after_delay(300),
        before_sleep=before_sleep_log(log, logging.WARNING),
        reraise=True,
    )
    return str(patience(call, *command))
