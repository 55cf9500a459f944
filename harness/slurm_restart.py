"""What SLURM says of the job this process is part of, and how it is had to start that job again."""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass

from tenacity import (
    Retrying,
    before_sleep_log,
    retry_if_exception_type,
    stop_after_delay,
    wait_exponential_jitter,
)

from harness.dispatch.slurm_queue import SchedulerGone, call

log = logging.getLogger("ssmscale.slurm")


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
    """Ask SLURM about a job; raises SchedulerGone where it has not answered for minutes."""
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
    """What one of SLURM's programs prints; raises SchedulerGone where SLURM has not answered for minutes."""
    patience = Retrying(
        retry=retry_if_exception_type(SchedulerGone),
        wait=wait_exponential_jitter(initial=1, max=20),
        stop=stop_after_delay(300),
        before_sleep=before_sleep_log(log, logging.WARNING),
        reraise=True,
    )
    return str(patience(call, *command))
