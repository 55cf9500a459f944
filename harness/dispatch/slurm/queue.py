"""What SLURM says of our jobs: one call of squeue and one of sacct, however many jobs there are.

squeue knows what waits and runs, and what ended in the last minutes; sacct, where the site has accounting, what ended
before. Where both speak of a job squeue is right: sacct still calls a requeued job PREEMPTED while it waits again, and
calls a job running for ever whose end the controller could not tell it.

What SLURM's words mean: its job states as a dispatcher's, and why a job waits in plain words.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from harness.record.jobs import LIVE, NOT_LOOKED_AT, JobState, JobView, SchedulerUnavailable

PENDING_ELEMENTS = re.compile(r"(\d+)_\[.*\]")
SQUEUE = "%i|%j|%T|%M|%N|%r"
SACCT = "JobID,JobName,State,ElapsedRaw,NodeList"
STEERING = ("SQUEUE_", "SACCT_", "SINFO_", "SBATCH_", "SCANCEL_")
"""How variables begin by which a user has SLURM's programs leave jobs out or ask for something else."""


SECONDS = 60.0
"""How long a call may take: a busy slurmctld answers late."""


def read_jobs(names: Sequence[str], since: float) -> dict[str, JobView]:
    """Jobs of these names by job id; accounting is looked through from a day before `since` (seconds of the epoch).

    Raises SchedulerUnavailable where squeue does not answer; accounting is asked for where there is one.
    """
    if not names:
        return {}
    wanted = ",".join(names)
    found: dict[str, JobView] = {}
    start = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(since - 86400))
    for line in _accounting(wanted, start):
        if (view := _from_sacct(line)) is not None:  # a line for each start, oldest first
            before = found.get(view.job_id)
            in_all = view.seconds + ((before.accounted_seconds if before else None) or 0.0)
            found[view.job_id] = replace(view, accounted_seconds=in_all)
    # Partitions that a site hides are not listed unless --all is asked for.
    answer = call(
        *("squeue", "--all", "--noheader", "--array", "--states=all"),
        *(f"--name={wanted}", f"--format={SQUEUE}"),
    )
    queue = {view.job_id: view for line in answer.splitlines() if (view := _from_squeue(line)) is not None}
    return put_together(queue, found)


def put_together(queue: Mapping[str, JobView], accounts: Mapping[str, JobView]) -> dict[str, JobView]:
    """What squeue and, before it, sacct said, by job id: of what is alive squeue alone knows."""
    views = dict(queue)
    for job_id, view in accounts.items():
        if job_id in queue:
            views[job_id] = replace(queue[job_id], accounted_seconds=view.accounted_seconds)
        elif view.state in LIVE:
            # Its clock goes on in the accounts; how long it ran the journals know.
            views[job_id] = replace(view, state=JobState.LOST, accounted_seconds=None)
        else:
            views[job_id] = view
    return views


def steering() -> list[str]:
    """Variables of this process's environment that SLURM's programs must not see."""
    return sorted(name for name in os.environ if name.startswith(STEERING))


def unavailable(why: str, *, is_here: bool = True) -> SchedulerUnavailable:
    """Return the error that says why SLURM does not answer."""
    return SchedulerUnavailable("SLURM", why, is_here=is_here)


def call(*command: str) -> str:
    """Standard output of one of SLURM's programs; raises SchedulerUnavailable with its last word where it fails.

    The program hears what it is asked and nothing of what the user's environment would add.
    """
    hidden = steering()
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except FileNotFoundError as error:
        why = f"{command[0]} is not installed here: is this a SLURM cluster's login node?"
        raise unavailable(why, is_here=shutil.which("squeue") is not None) from error
    except subprocess.TimeoutExpired as error:
        raise unavailable(f"{command[0]} has not answered for {SECONDS:.0f} s") from error
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise unavailable(said[-1].strip() if said else f"{command[0]} ended with {done.returncode}")
    return done.stdout


def cluster_name() -> str:
    """SLURM's name of the cluster that its programs speak to here. Raises SchedulerUnavailable."""
    found = re.search(r"^ClusterName\s*=\s*(\S+)", call("scontrol", "show", "config"), re.MULTILINE)
    if found is None:
        raise unavailable("scontrol show config tells no ClusterName")
    return found[1]


def _accounting(wanted: str, since: str) -> list[str]:
    try:
        return call(
            "sacct",
            "--allocations",
            "--duplicates",
            "--noheader",
            "--parsable2",
            f"--name={wanted}",
            f"--starttime={since}",
            f"--format={SACCT}",
        ).splitlines()
    except SchedulerUnavailable:  # many sites keep no accounts: squeue and the journals have to do
        return []


def _from_squeue(line: str) -> JobView | None:
    fields = line.split("|", 5)
    if len(fields) < 6:  # a heading of the site's own, such as CLUSTER: c
        return None
    job_id, name, said, elapsed, nodes, reason = fields
    state = state_of(said)
    if state is None or PENDING_ELEMENTS.fullmatch(job_id):
        return None
    waits = state is JobState.QUEUED
    return JobView(
        job_id,
        name,
        state,
        said,
        _seconds(elapsed),
        nodes,
        reason=reason if waits else None,
        explained=explain(reason) if waits else None,
    )


def _from_sacct(line: str) -> JobView | None:
    fields = line.split("|", 4)
    if len(fields) < 5:
        return None
    job_id, name, said, elapsed, nodes = fields
    state = state_of(said)
    if state is None or PENDING_ELEMENTS.fullmatch(job_id):
        return None
    return JobView(job_id, name, state, said.split()[0], float(elapsed or 0), nodes)


def _seconds(elapsed: str) -> float:
    """Seconds of squeue's [days-][hours:]minutes:seconds."""
    days, _, clock = elapsed.rpartition("-")
    total = 0.0
    for part in clock.split(":"):
        if not part.isdigit():  # INVALID, where a node's clock is wrong
            return 0.0
        total = 60 * total + int(part)
    return total + 86400 * int(days or 0)


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
    "None": NOT_LOOKED_AT,
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
        return NOT_LOOKED_AT
    words = REASONS.get(first[0]) or next((w for name, w in FAMILIES if first[0].startswith(name)), None)
    return f"{reason} ({words})" if words else reason
