"""What SLURM's words mean: its job states as a dispatcher's, and why a job waits in plain words."""

from __future__ import annotations

from harness.dispatch.base import JobState

QUEUED, RUNNING, ENDED, PREEMPTED, LOST = (
    JobState.QUEUED,
    JobState.RUNNING,
    JobState.ENDED,
    JobState.PREEMPTED,
    JobState.LOST,
)
STATES = {
    "PENDING": QUEUED,
    "REQUEUED": QUEUED,
    "REQUEUE_FED": QUEUED,
    "REQUEUE_HOLD": QUEUED,
    "RESV_DEL_HOLD": QUEUED,
    "SPECIAL_EXIT": QUEUED,
    "EXPEDITING": QUEUED,
    "CONFIGURING": RUNNING,
    "POWER_UP_NODE": RUNNING,
    "RUNNING": RUNNING,
    "COMPLETING": RUNNING,
    "SIGNALING": RUNNING,
    "STAGE_OUT": RUNNING,
    "RESIZING": RUNNING,
    "SUSPENDED": RUNNING,
    "STOPPED": RUNNING,
    "UPDATE_DB": RUNNING,
    "COMPLETED": ENDED,
    "FAILED": ENDED,
    "CANCELLED": PREEMPTED,
    "DEADLINE": PREEMPTED,
    "PREEMPTED": PREEMPTED,
    "REVOKED": PREEMPTED,
    "BOOT_FAIL": LOST,
    "LAUNCH_FAILED": LOST,
    "NODE_FAIL": LOST,
    "OUT_OF_MEMORY": LOST,
    "RECONFIG_FAIL": LOST,
    "TIMEOUT": LOST,
}
"""Every state of SLURM's, 22.05 to 25.05 (job state codes of squeue's manual and of schedmd.com), as a dispatcher's."""
REASONS = {
    "None": "SLURM has not looked at it yet",
    "WaitingForScheduling": "SLURM has not looked at it yet",
    "Priority": "jobs of higher priority go first",
    "Resources": "no nodes are free for it",
    "BeginTime": "not before its begin time; a requeued job is given one, too",
    "JobArrayTaskLimit": "as many of its array run as limits.parallel lets",
    "Dependency": "another job goes first",
    "DependencyNeverSatisfied": "the job it waits for never ends well: cancel it",
    "JobHeldUser": "you hold it: scontrol release",
    "JobHeldAdmin": "an administrator holds it",
    "Cleaning": "what is left of its last start is being cleared away",
    "Prolog": "its nodes are being made ready",
    "PartitionDown": "its partition is down",
    "PartitionInactive": "its partition starts no jobs now",
    "PartitionTimeLimit": "asks for more time than its partition gives: lower limits.hours",
    "PartitionNodeLimit": "asks for more nodes than its partition gives",
    "ReqNodeNotAvail": "nodes it needs are down, reserved or taken",
    "NodeDown": "a node it needs is down",
    "Reservation": "its reservation has not begun",
    "Licenses": "a licence it needs is taken",
    "BadConstraints": "no node is as it asks: see constraint and gpu_type",
    "InvalidAccount": "the account is not known",
    "InvalidQOS": "the QOS is not known",
    "JobLaunchFailure": "it could not be started: see ssmscale logs",
    "launch": "it could not be started and is held: see ssmscale logs, then scontrol release",
    "QOSJobLimit": "the QOS lets no more jobs run",
    "QOSTimeLimit": "the QOS's time is used up",
    "AssociationJobLimit": "the account lets no more jobs run",
    "AssociationTimeLimit": "the account's time is used up",
}
"""Why a job waits (job reason codes of squeue's manual), in words and with what helps."""
FAMILIES = (
    ("QOSMaxJobs", "the QOS lets a user run no more jobs at once"),
    ("QOSMaxSubmit", "the QOS lets a user submit no more jobs"),
    ("QOSGrp", "all jobs of the QOS together are at its limit"),
    ("QOSMin", "asks for less than the QOS wants of a job"),
    ("QOSMax", "the QOS allows no more to a job or a user"),
    ("QOS", "the QOS is at a limit"),
    ("AssocMaxJobs", "the account lets a user run no more jobs at once"),
    ("AssocGrp", "all jobs of the account together are at its limit"),
    ("AssocMax", "the account allows no more to a job or a user"),
    ("Assoc", "the account is at a limit"),
    ("MaxJobs", "no more of your jobs may run at once"),
)
"""Beginnings of reasons that SLURM has by the dozen, the longer ones first."""


def state_of(said: str) -> JobState | None:
    """A state as squeue or sacct print it ("CANCELLED by 1000", "RUNNING+"); None where nothing is said.

    A state that is not known counts as running: whoever took the job for gone would submit it twice.
    """
    words = said.replace("+", " ").split()
    return STATES.get(words[0], RUNNING) if words else None


def explain(reason: str) -> str:
    """SLURM's reason for a job to wait, and what it means where that is known: `Priority (jobs of ... go first)`."""
    first = reason.strip("()").replace(",", " ").replace("_", " ").split()
    if not first:
        return REASONS["None"]
    words = REASONS.get(first[0]) or next((w for name, w in FAMILIES if first[0].startswith(name)), None)
    return f"{reason} ({words})" if words else reason
