"""Checks of a profile's partitions, accounts and limits against SLURM.

SLURM's own programs answer, and no job is submitted; `sbatch --test-only` checks a job as a whole.
"""

from __future__ import annotations

import getpass
import re
from collections.abc import Iterator
from dataclasses import dataclass

from harness.common.format import counted
from harness.dispatch.slurm.queue import call, seconds_of
from harness.doctor.machine import Finding
from harness.plan.cluster import Profile
from harness.record.jobs import SchedulerUnavailable

AWAY = re.compile(r"down|drain|fail|inval|maint|unk", re.IGNORECASE)
"""Parts of the states of nodes that take no new job now."""
GPU = re.compile(r"gpu:(?:([^:,()]+):)?(\d+)")
"""Name and number of one kind of GPU in a node's generic resources, such as gpu:h100:8(S:0-1)."""


NONE_UP = "no such node is up"


@dataclass(frozen=True)
class Nodes:
    """Equal nodes of a partition."""

    available: bool
    """True if the partition takes jobs."""
    count: int
    cores: int
    memory_mib: int
    gpus: tuple[tuple[str, int], ...]
    """Name and number of each kind of GPU."""
    hours: float | None
    """Longest job; None where there is no limit."""
    state: str

    def gpus_of(self, kind: str | None) -> int:
        """Return the number of GPUs of a kind, of all kinds if it is None."""
        return sum(number for name, number in self.gpus if kind in {None, name})


def examine_slurm(profile: Profile) -> Iterator[Finding]:
    """Check all values of a profile against SLURM's answers."""
    answer = _asked("scontrol", "ping")
    if isinstance(answer, SchedulerUnavailable):
        remedy = "run this on a login node of the cluster, or set SLURM_CONF; SLURM was asked nothing more"
        yield Finding.of("slurmctld", str(answer), remedy, needed=True)
        return
    yield Finding.of("slurmctld", answer.splitlines()[0])
    partitions = [partition(profile, name) for name in profile.partitions]
    yield from partitions
    answer = _asked("scontrol", "show", "config")
    if isinstance(answer, SchedulerUnavailable):
        remedy = "run this again; array size, requeueing, accounting and a whole job were not checked"
        yield Finding.of("slurm.conf", str(answer), remedy, needed=True)
        return
    config = dict(re.findall(r"^(\w+)\s*= (.*)$", answer, re.MULTILINE))
    yield array_limit(profile, config)
    yield requeueing(config)
    yield from accounting(profile, config)
    yield trial(profile, are_away=any(NONE_UP in found.found for found in partitions))


def partition(profile: Profile, name: str) -> Finding:
    """Check that a partition exists and takes jobs, on nodes that match the profile."""
    title = f"partition {name}"
    form = "%a|%D|%c|%m|%G|%l|%T"
    answer = _asked("sinfo", "--noheader", "--exact", f"--partition={name}", f"--format={form}")
    nodes = [] if isinstance(answer, SchedulerUnavailable) else [*_groups(answer)]
    if not nodes:
        known = _asked("sinfo", "--all", "--noheader", "--format=%R")
        there = known if isinstance(known, SchedulerUnavailable) else ", ".join(sorted(set(known.split())))
        remedy = f"remove it from the profile's partitions, or correct it; SLURM has {there}"
        found = "SLURM has no partition of that name"
        return Finding.of(title, found, remedy, needed=True)
    own = profile.partitions[name]
    fitting = [
        group
        for group in nodes
        if group.gpus_of(profile.gpu_type) >= profile.gpus
        and group.cores >= profile.cores
        and group.memory_mib >= 1024 * profile.memory_gib
    ]
    wanted = min(own.nodes or profile.nodes, profile.nodes)
    hours, asked = nodes[0].hours, _hours_asked(profile, name)
    too_long = hours is not None and asked > hours
    problems = []
    if not nodes[0].available:
        problems.append(("it takes no jobs now", "wait, or name another partition first"))
    if not fitting:
        problems.append((f"no node has {_described(profile)}", "correct gpus, gpu_type, cores, memory_gib"))
    elif sum(group.count for group in fitting) < wanted:
        problems.append((f"fewer than {wanted} nodes have {_described(profile)}", "correct nodes"))
    elif not any(AWAY.search(group.state) is None for group in fitting):
        problems.append((NONE_UP, "ask the site; until then jobs wait"))
    if too_long:
        too_much = f"its jobs end after {hours:g} h, and jobs ask for {asked:g}"
        problems.append((too_much, f"set limits.hours, or hours of partitions.{name}, to {hours:g}"))
    kinds = "; ".join(dict.fromkeys(_shown(group) for group in nodes))
    limit = "no time limit" if hours is None else f"at most {hours:g} h"
    found = f"{', '.join(found for found, _ in problems)}: {kinds}" if problems else f"{kinds}; {limit}"
    remedies = "; ".join(remedy for _, remedy in problems) or None
    return Finding.of(title, found, remedies, needed=not fitting or too_long)


def array_limit(profile: Profile, config: dict[str, str]) -> Finding:
    """Check that SLURM takes arrays as large as the profile's array_size."""
    most, ours = int(config.get("MaxArraySize", "1001")), profile.limits.array_size
    found = f"MaxArraySize is {most}, limits.array_size {ours}"
    remedy = None if ours <= most else f"set limits.array_size to {most}"
    return Finding.of("array size", found, remedy, needed=True)


def requeueing(config: dict[str, str]) -> Finding:
    """Check that SLURM requeues a job that it preempts or whose node fails."""
    mode = config.get("PreemptMode", "OFF")
    found = f"JobRequeue is {config.get('JobRequeue', '?')} (jobs ask for it themselves), PreemptMode {mode}"
    remedy = "SLURM does not restart a preempted job: repeat the submission from time to time"
    return Finding.of("requeue", found, remedy if "CANCEL" in mode.upper() else None)


def accounting(profile: Profile, config: dict[str, str]) -> Iterator[Finding]:
    """Check that this user may charge the account and use the QOS that the profile names."""
    user = getpass.getuser()
    show = ("sacctmgr", "--noheader", "--parsable2", "show")
    rows = _asked(*show, "associations", f"user={user}", "format=account,qos")
    known = _asked(*show, "qos", "format=name")
    if isinstance(rows, SchedulerUnavailable) or isinstance(known, SchedulerUnavailable):
        found = "sacctmgr does not answer"
        yield Finding.of("accounting", found, "nothing to do: `status` uses squeue and the journals")
        return
    pairs = [line.split("|") for line in rows.splitlines() if "|" in line]
    accounts = sorted({account for account, _ in pairs})
    if profile.account is not None:
        charged = profile.account.lower() in accounts  # SLURM keeps them in lower case
        found = f"user {user} may charge {', '.join(accounts) or 'none'}"
        remedy = None if charged else "correct account, or ask the site to add you to it"
        needed = "associations" in config.get("AccountingStorageEnforce", "")
        yield Finding.of(f"account {profile.account}", found, remedy, needed=needed)
    lists = [qos.split(",") for account, qos in pairs if profile.account in {None, account}]
    granted = {name for names in lists for name in names if name}
    wanted = [profile.qos, *(part.qos for part in profile.partitions.values())]
    for name in dict.fromkeys(name for name in wanted if name is not None):
        allowed = sorted((granted or set(known.split())) & set(known.split()))
        found = f"user {user} may use {', '.join(allowed) or 'none'}"
        remedy = None if name in allowed else "correct qos, or ask the site for it"
        yield Finding.of(f"QOS {name}", found, remedy, needed=True)


def trial(profile: Profile, *, are_away: bool = False) -> Finding:
    """Check that SLURM accepts a job of one whole node, without queueing it.

    If all nodes of a partition `are_away`, its refusal says nothing of the profile.
    """
    names = profile.partitions_for(1)
    kind = f"{profile.gpu_type}:" if profile.gpu_type else ""
    asked = {
        "partition": ",".join(names),
        "time": str(max(1, round(60 * profile.hours_in(names)))),
        "nodes": "1",
        "ntasks-per-node": "1",
        "cpus-per-task": str(profile.cores),
        "mem": f"{int(1024 * profile.memory_gib)}MB",
        "gpus-per-node": f"{kind}{profile.gpus}" if profile.gpus else None,
        "account": profile.account,
        "qos": profile.qos_in(names),
        "constraint": profile.constraint,
        "exclude": profile.exclude,
        "reservation": profile.reservation,
    }
    options = [f"--{key}={value}" for key, value in asked.items() if value is not None]
    answer = _asked("sbatch", "--test-only", *options, "--wrap=true")
    if isinstance(answer, SchedulerUnavailable):
        remedy = "correct the values it names in the profile"
        if are_away:
            remedy = "nothing to correct before nodes are up again: see the partition above"
        return Finding.of("a job", str(answer), remedy, needed=True)
    return Finding.of("a job", f"SLURM accepts one of {_described(profile)}")


def _asked(*command: str) -> str | SchedulerUnavailable:
    try:
        return call(*command)
    except SchedulerUnavailable as gone:
        return gone


def _hours_asked(profile: Profile, name: str) -> float:
    """Return the most hours requested by a job that can start in a partition."""
    together = [profile.partitions_for(nodes) for nodes in range(1, profile.nodes + 1)]
    return max((profile.hours_in(names) for names in together if name in names), default=0.0)


def _groups(answer: str) -> Iterator[Nodes]:
    for line in answer.splitlines():
        if len(fields := line.split("|", 6)) == 7:  # other lines are headings that the site adds
            available, count, cores, memory, gres, limit, state = fields
            gpus = tuple((name, int(number)) for name, number in GPU.findall(gres))
            sizes = int(count), int(cores.rstrip("+")), int(memory.rstrip("+"))
            time = limit if ":" in limit else f"{limit}:00"  # a single number is minutes
            hours = seconds_of(time) / 3600 if limit[:1].isdigit() else None
            yield Nodes(available == "up", *sizes, gpus, hours, state)


def _described(profile: Profile) -> str:
    kind = f" {profile.gpu_type}" if profile.gpu_type else ""
    gpus = f"{profile.gpus}{kind} GPUs, " if profile.gpus else ""
    return f"{gpus}{profile.cores} cores and {profile.memory_gib:g} GiB"


def _shown(group: Nodes) -> str:
    gpus = ", ".join(f"{number} {f'{name} ' if name else ''}GPUs" for name, number in group.gpus)
    return (
        f"{counted(group.count, 'node')} {group.state} with {f'{gpus}, ' if gpus else ''}{group.cores} cores, "
        f"{group.memory_mib / 1024:.4g} GiB"
    )
