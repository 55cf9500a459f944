"""What SLURM says of our jobs: one call of squeue and one of sacct, however many jobs there are.

squeue knows what waits and runs, and what ended in the last minutes; sacct, where the site has accounting, what ended
before. Where both speak of a job squeue is right: sacct still calls a requeued job PREEMPTED while it waits again, and
calls a job running for ever whose end the controller could not tell it.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from harness.dispatch.base import JobState
from harness.dispatch.slurm_words import state_of

PENDING_ELEMENTS = re.compile(r"(\d+)_\[.*\]")
SQUEUE = "%i|%j|%T|%M|%N|%r"
SACCT = "JobID,JobName,State,ElapsedRaw,NodeList"
LIVE = frozenset({JobState.QUEUED, JobState.RUNNING})
STEERING = ("SQUEUE_", "SACCT_", "SINFO_", "SBATCH_", "SCANCEL_")
"""How variables begin by which a user has SLURM's programs leave jobs out or ask for something else."""
ELSEWHERE = "ELSEWHERE"
"""Our word for the state of a job of another SLURM cluster, which is not asked from here."""
SECONDS = 60.0
"""How long a call may take: a busy slurmctld answers late."""


class SchedulerGone(RuntimeError):
    """SLURM does not answer; what it would say is not known, which is no word about the jobs."""


@dataclass(frozen=True)
class JobView:
    """One job, or one element of an array, as SLURM sees it."""

    job_id: str
    """12, or 12_3 for an array's element."""
    name: str
    state: JobState
    slurm_state: str
    seconds: float
    """Time it has run since it last started."""
    nodes: str
    reason: str | None = None
    """Why it waits."""
    accounted_seconds: float | None = None
    """Time it has run in all, every start counted; None without accounting."""
    packed: bool = False
    """Whether it trains other Series too: that it runs does not say that it trains this one now."""


def read_jobs(names: Sequence[str], since: str) -> dict[str, JobView]:
    """Jobs of these names by job id; `since` bounds what accounting looks through, as sacct's --starttime takes it.

    Raises SchedulerGone where squeue does not answer; accounting is asked for where there is one.
    """
    if not names:
        return {}
    wanted = ",".join(names)
    found: dict[str, JobView] = {}
    for line in _accounting(wanted, since):
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


def call(*command: str) -> str:
    """Standard output of one of SLURM's programs; raises SchedulerGone with its last word where it fails.

    The program hears what it is asked and nothing of what the user's environment would add.
    """
    hidden = steering()
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except FileNotFoundError as error:
        raise SchedulerGone(
            f"{command[0]} is not installed here: is this a SLURM cluster's login node?"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise SchedulerGone(f"{command[0]} has not answered for {SECONDS:.0f} s") from error
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise SchedulerGone(said[-1].strip() if said else f"{command[0]} ended with {done.returncode}")
    return done.stdout


def cluster_name() -> str:
    """SLURM's name of the cluster that its programs speak to here. Raises SchedulerGone."""
    found = re.search(r"^ClusterName\s*=\s*(\S+)", call("scontrol", "show", "config"), re.MULTILINE)
    if found is None:
        raise SchedulerGone("scontrol show config tells no ClusterName")
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
    except SchedulerGone:  # many sites keep no accounts: squeue and the journals have to do
        return []


def _from_squeue(line: str) -> JobView | None:
    fields = line.split("|", 5)
    if len(fields) < 6:  # a heading of the site's own, such as CLUSTER: c
        return None
    job_id, name, said, elapsed, nodes, reason = fields
    state = state_of(said)
    if state is None or PENDING_ELEMENTS.fullmatch(job_id):
        return None
    return JobView(
        job_id, name, state, said, _seconds(elapsed), nodes, reason if state is JobState.QUEUED else None
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
