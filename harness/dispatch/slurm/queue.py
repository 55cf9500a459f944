"""SLURM's view of jobs, read by one call of squeue and one of sacct for all of them, and the meaning of its codes.

squeue lists jobs that wait, run, or ended in the last minutes; sacct, on sites with accounting, jobs that ended before.
squeue takes precedence: sacct calls a requeued job PREEMPTED while it waits again, and shows a job as running for ever
if slurmctld could not report its end.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from harness.record.jobs import LIVE, NOT_LOOKED_AT, JobState, JobView, SchedulerUnavailable

PENDING_ELEMENTS = re.compile(r"(\d+)_\[.*\]")
SQUEUE = "%i|%j|%T|%M|%N|%r"
SACCT = "JobID,JobName,State,ElapsedRaw,NodeList"
STEERING = re.compile(
    "(SLURM|SLURMD|SALLOC|SBATCH|SRUN|SACCT|SCANCEL|SCONTROL|SINFO|SQUEUE|PMI|PMI2|PMIX|OMPI|PRTE|TORCHELASTIC|PYXIS)_.*"
    "|SUBMITIT_.*|SSMSCALE_MEETING|((LOCAL|GROUP|NODE|ROLE)_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)"
    "|(CUDA|ROCR|HIP)_VISIBLE_DEVICES|GPU_DEVICE_ORDINAL|ZE_AFFINITY_MASK"
)
"""Variables that change what SLURM's programs list or request, or that describe the job and ranks of a shell."""
ACCESS = re.compile("SLURM_(CONF|JWT|SACK).*")
"""Those by which SLURM's programs find their cluster and log in."""
OF_A_JOB = re.compile(
    "SLURM_(JOB|ARRAY_|RESTART_COUNT|CLUSTER_NAME|SUBMIT_|NODELIST|TOPOLOGY_|WORKING_|MEM_PER_NODE|GPUS_(PER|ON)_NODE).*"
    "|SUBMITIT_.*|.*_VISIBLE_DEVICES|GPU_DEVICE_ORDINAL|ZE_AFFINITY_MASK"
)
"""Those that SLURM sets for a job and that hold for its steps too."""
ACTS = ("sbatch", "scancel", "requeue")
"""Words of calls that change something; all others are questions."""
SECONDS, ACT_SECONDS = 10.0, 60.0
"""Time limits of a question and of a call that acts; a busy slurmctld answers late."""
_silent: dict[str, tuple[float, SchedulerUnavailable]] = {}
"""By program, the time of the newest question without an answer, by the monotonic clock: the next do not wait again."""


def read_jobs(names: Sequence[str], since: float) -> dict[str, JobView]:
    """Return the jobs of these names by job id; accounts are read from a day before `since` (seconds since 1970).

    Raises SchedulerUnavailable if squeue does not answer.
    """
    if not names:
        return {}
    wanted = ",".join(names)
    found: dict[str, JobView] = {}
    start = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(since - 86400))
    # Without --all squeue leaves out hidden partitions.
    squeue = (
        "squeue",
        "--all",
        "--noheader",
        "--array",
        "--states=all",
        f"--name={wanted}",
        f"--format={SQUEUE}",
    )
    with ThreadPoolExecutor(2) as pool:
        accounts = pool.submit(_accounting, wanted, start)
        answer = pool.submit(call, *squeue).result()
    for line in accounts.result():
        if (view := _from_sacct(line)) is not None:  # one line for each start, oldest first
            before = found.get(view.job_id)
            in_all = view.seconds + ((before.accounted_seconds if before else None) or 0.0)
            found[view.job_id] = replace(view, accounted_seconds=in_all)
    queue = {view.job_id: view for line in answer.splitlines() if (view := _from_squeue(line)) is not None}
    return put_together(queue, found)


def put_together(queue: Mapping[str, JobView], accounts: Mapping[str, JobView]) -> dict[str, JobView]:
    """Merge the answers of squeue and sacct by job id; only jobs that squeue knows are live."""
    views = dict(queue)
    for job_id, view in accounts.items():
        if job_id in queue:
            views[job_id] = replace(queue[job_id], accounted_seconds=view.accounted_seconds)
        elif view.state in LIVE:
            # Its time still grows in the accounts; the journals know how long it ran.
            views[job_id] = replace(view, state=JobState.LOST, accounted_seconds=None)
        else:
            views[job_id] = view
    return views


def steering(*, in_job: bool = False) -> list[str]:
    """Return the variables of this process's environment that SLURM's programs must not see.

    Jobs inherit them from the shell that submits, and srun prefers several of them to its job's resources. In a job,
    srun may see what SLURM has set for that job.
    """

    def may_be_seen(name: str) -> bool:
        return bool(ACCESS.fullmatch(name) or (in_job and OF_A_JOB.fullmatch(name)))

    return sorted(name for name in os.environ if STEERING.fullmatch(name) and not may_be_seen(name))


def environment_of_srun(**more: str) -> dict[str, str]:
    """Return the environment of an srun in this job: the job's own, and `more`."""
    hidden = steering(in_job=True)
    return {name: value for name, value in os.environ.items() if name not in hidden} | more


def unavailable(why: str, *, is_here: bool = True) -> SchedulerUnavailable:
    """Return the error that says why SLURM does not answer."""
    return SchedulerUnavailable("SLURM", why, is_here=is_here)


def call(*command: str) -> str:
    """Return the output of one of SLURM's programs; raises SchedulerUnavailable with its last error line if it fails.

    Variables of the user's that would change the answer are hidden from the program. After a question without an answer
    the next ones fail at once for a while.
    """
    acts = any(word in ACTS for word in command[:2])
    seconds = ACT_SECONDS if acts else SECONDS
    since, silence = _silent.get(command[0], (float("-inf"), None))
    if silence is not None and not acts and time.monotonic() - since < SECONDS:
        raise silence
    hidden = steering()
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )
    except FileNotFoundError as error:
        why = f"{command[0]} is not installed here; run the command on a login node of the SLURM cluster"
        raise unavailable(why, is_here=shutil.which("squeue") is not None) from error
    except subprocess.TimeoutExpired as error:
        silence = unavailable(f"{command[0]} has not answered for {seconds:.0f} s")
        _silent[command[0]] = (time.monotonic(), silence)
        raise silence from error
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise unavailable(said[-1].strip() if said else f"{command[0]} ended with {done.returncode}")
    return done.stdout


def cluster_name() -> str:
    """Return the name of the cluster whose SLURM programs run here. Raises SchedulerUnavailable."""
    found = re.search(r"^ClusterName\s*=\s*(\S+)", call("scontrol", "show", "config"), re.MULTILINE)
    if found is None:
        raise unavailable("scontrol show config names no ClusterName")
    return found[1]


def _accounting(wanted: str, since: str) -> list[str]:
    try:
        return call(
            *("sacct", "--allocations", "--duplicates", "--noheader", "--parsable2"),
            *(f"--name={wanted}", f"--starttime={since}", f"--format={SACCT}"),
        ).splitlines()
    except SchedulerUnavailable:  # many sites keep no accounts: squeue and the journals suffice
        return []


def _from_squeue(line: str) -> JobView | None:
    fields = line.split("|", 5)
    if len(fields) < 6:  # a heading that the site adds, such as CLUSTER: c
        return None
    job_id, name, said, elapsed, nodes, reason = fields
    view = _view(job_id, name, said, seconds_of(elapsed), nodes)
    if view is not None and view.state is JobState.QUEUED:
        return replace(view, reason=reason, explained=explain(reason))
    return view


def _from_sacct(line: str) -> JobView | None:
    fields = line.split("|", 4)
    if len(fields) < 5:
        return None
    job_id, name, said, elapsed, nodes = fields
    return _view(job_id, name, said.partition(" ")[0], float(elapsed or 0), nodes)


def _view(job_id: str, name: str, said: str, seconds: float, nodes: str) -> JobView | None:
    state = state_of(said)
    if state is None or PENDING_ELEMENTS.fullmatch(job_id):
        return None
    return JobView(job_id, name, state, said, seconds, nodes)


def seconds_of(time: str) -> float:
    """Return the seconds of SLURM's [days-][hours:]minutes:seconds."""
    days, _, clock = time.rpartition("-")
    total = 0.0
    for part in clock.split(":"):
        if not part.isdigit():  # INVALID, if a node's clock is wrong
            return 0.0
        total = 60 * total + int(part)
    return total + 86400 * int(days or 0)


STATES = {
    name: state
    for state, names in (
        (
            JobState.QUEUED,
            "PENDING REQUEUED REQUEUE_FED REQUEUE_HOLD RESV_DEL_HOLD SPECIAL_EXIT EXPEDITING",
        ),
        (
            JobState.RUNNING,
            "CONFIGURING POWER_UP_NODE RUNNING COMPLETING SIGNALING STAGE_OUT RESIZING SUSPENDED STOPPED UPDATE_DB",
        ),
        (JobState.ENDED, "COMPLETED FAILED"),
        (JobState.PREEMPTED, "CANCELLED DEADLINE PREEMPTED REVOKED"),
        (
            JobState.LOST,
            "BOOT_FAIL LAUNCH_FAILED NODE_FAIL OUT_OF_MEMORY RECONFIG_FAIL TIMEOUT",
        ),
    )
    for name in names.split()
}
"""Every state of a SLURM job, 22.05 to 25.05 (job state codes of squeue's manual and of schedmd.com), as a JobState."""
REASONS = {
    "None": NOT_LOOKED_AT,
    "WaitingForScheduling": "SLURM has not looked at it yet",
    "Priority": "jobs of higher priority go first",
    "Resources": "no nodes are free for it",
    "BeginTime": "its begin time has not come; a requeued job has one too",
    "JobArrayTaskLimit": "limits.parallel jobs of its array run already",
    "Dependency": "it depends on another job",
    "DependencyNeverSatisfied": "the job it depends on failed: cancel it",
    "JobHeldUser": "you hold it: scontrol release",
    "JobHeldAdmin": "an administrator holds it",
    "Cleaning": "SLURM cleans up after its last start",
    "Prolog": "its nodes are being prepared",
    "PartitionDown": "its partition is down",
    "PartitionInactive": "its partition starts no jobs now",
    "PartitionTimeLimit": "it requests more time than its partition allows: lower limits.hours",
    "PartitionNodeLimit": "it requests more nodes than its partition allows",
    "ReqNodeNotAvail": "nodes it needs are down, reserved or taken",
    "NodeDown": "a node it needs is down",
    "Reservation": "its reservation has not begun",
    "Licenses": "a licence it needs is in use",
    "BadConstraints": "no node meets its constraints: see constraint and gpu_type",
    "InvalidAccount": "the account is unknown",
    "InvalidQOS": "the QOS is unknown",
    "JobLaunchFailure": "it could not be started: its log says why",
    "launch": "it could not be started and is held: its log says why; then scontrol release",
    "QOSJobLimit": "the QOS allows no more running jobs",
    "QOSTimeLimit": "the QOS's time is used up",
    "AssociationJobLimit": "the account allows no more running jobs",
    "AssociationTimeLimit": "the account's time is used up",
}
"""Meaning of each reason for which a job waits (job reason codes of squeue's manual), and what helps."""
FAMILIES = (
    ("QOSMaxJobs", "the QOS allows a user no more running jobs"),
    ("QOSMaxSubmit", "the QOS allows a user no more submitted jobs"),
    ("QOSGrp", "all jobs of the QOS together are at its limit"),
    ("QOSMin", "it requests less than the minimum of the QOS"),
    ("QOSMax", "the QOS allows no more to a job or a user"),
    ("QOS", "the QOS is at a limit"),
    ("AssocMaxJobs", "the account allows a user no more running jobs"),
    ("AssocGrp", "all jobs of the account together are at its limit"),
    ("AssocMax", "the account allows no more to a job or a user"),
    ("Assoc", "the account is at a limit"),
    ("MaxJobs", "no more of your jobs may run at once"),
)
"""Meaning of each group of reasons by its prefix, longer prefixes first."""


def state_of(text: str) -> JobState | None:
    """Parse a state as squeue or sacct prints it ("CANCELLED by 1000", "RUNNING+"); None for an empty text.

    An unknown state counts as running: a job wrongly taken for ended would be submitted twice.
    """
    words = text.replace("+", " ").split()
    return STATES.get(words[0], JobState.RUNNING) if words else None


def explain(reason: str) -> str:
    """Add its meaning, if known, to SLURM's reason for a job to wait: `Resources (no nodes are free for it)`."""
    first = reason.strip("()").replace(",", " ").replace("_", " ").split()
    if not first:
        return NOT_LOOKED_AT
    meaning = REASONS.get(first[0]) or next(
        (text for name, text in FAMILIES if first[0].startswith(name)), ""
    )
    return f"{reason} ({meaning})" if meaning else reason
