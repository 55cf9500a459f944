"""The plan of a study as it stands: what the journals and the schedulers say of its Runs taken into account."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from harness.plan.allocation import describe_shares
from harness.plan.cluster import Cluster, load_profile, this_machine
from harness.plan.plan import Plan, make_plan
from harness.record.jobs import JobView
from harness.record.registry import ResolvedStudy, open_study
from harness.submit.monitor import jobs_of
from ssmttm.errors import InputError


def planned(
    study: str, root: Path | None, changes: Sequence[str] | None, cluster: str | None
) -> tuple[ResolvedStudy, Plan]:
    """A study and what is left to train of it, here or on a cluster; trains nothing and fetches nothing."""
    resolved = open_study(study, root, changes, fetch=False)
    made = plan_of(resolved, cluster)
    if cluster and (shares := describe_shares(made.missing, load_profile(cluster), "auto")):
        note = ("packing", f"--on auto trains {'; '.join(shares)}")
        made = replace(made, notes=(*made.notes, note))
    return resolved, made


def plan_of(resolved: ResolvedStudy, cluster: str | None) -> Plan:
    """What is left to train of a study, here or on a cluster."""
    return plan_for(resolved, load_profile(cluster).cluster() if cluster else this_machine())


def plan_for(resolved: ResolvedStudy, cluster: Cluster, jobs: Mapping[str, JobView] | None = None) -> Plan:
    """Return the plan of a study for a machine or a cluster; `jobs` where they were asked for."""
    known = jobs_of(resolved) if jobs is None else jobs
    try:
        return make_plan(resolved.study, resolved.points, resolved.corpus, resolved.root, cluster, known)
    except InputError as error:
        raise InputError(f"{resolved.where}: {error}") from error
