"""The size of an allocation in which Series are packed, and its time.

Devices that Series cannot use at once stand idle, and so do those that are free while only the longest Series trains:
no number of them ends sooner than that. A schedule that leaves no device idle while a Series waits takes at most the
time of the work shared out evenly and of the longest Series after it (Graham 1969).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from harness.common.format import Estimate, counted, duration
from harness.plan.cluster import Cluster, Profile, nodes_for
from harness.plan.plan import PlannedRun
from harness.study.run import Count, Frozen, Positive, by_series
from ssmttm.errors import InputError


class Shape(Frozen):
    """Resources that all jobs of an array share."""

    nodes: Count
    ranks: Count
    """Ranks in all, as many on each node."""
    threads: Count
    """CPU cores a rank."""
    memory_gib: Positive
    """Memory a node, GiB."""

    @property
    def ranks_a_node(self) -> int:
        """Ranks on each node: its tasks, and its GPUs."""
        return self.ranks // self.nodes


BRIEF_HOURS = 0.5
"""Shorter work gets fewer devices: a job waits for nodes, and takes minutes to start on them."""
RAY_GIB = 2.0
"""Memory of a node that Ray's own processes take beside the workers."""
SLACK_HOURS = 0.25
"""Hours added to the request, in which Ray and the first workers start."""


@dataclass(frozen=True)
class Demand:
    """Demand of one Series on an allocation."""

    name: str
    """Size and architecture."""
    ranks: int
    share: float
    """Devices a rank takes: a GPU or a part of one, or CPU cores where there are no GPUs."""
    hours: Estimate
    nodes: int
    """Nodes its ranks need at least: all cores of a rank are on one node."""

    @property
    def devices(self) -> float:
        """Devices of all its ranks."""
        return self.ranks * self.share


@dataclass(frozen=True)
class Allocation:
    """The request to SLURM for a whole study."""

    shape: Shape
    hours: float
    """Hours requested; SLURM requeues the job for work that is left after them."""
    kind: str
    """Name of a device: GPU or core."""

    def __str__(self) -> str:
        return _nodes_with(self.shape.nodes, self.shape.ranks_a_node, self.kind)


def demand_of(runs: Sequence[PlannedRun], cluster: Cluster) -> Demand:
    """Return the demand of one Series, given its Runs."""
    one = runs[0]
    point, ranks, threads = one.status.point, one.layout.ranks, one.layout.threads
    share = one.size.resources.gpu_fraction if cluster.gpus else float(min(threads, cluster.cores))
    name, hours = f"{point.size} ({point.architecture})", sum((run.hours for run in runs), Estimate())
    return Demand(name, ranks, share, hours, nodes_for(one.layout, cluster))


def share_out(
    runs: Sequence[PlannedRun], profile: Profile, on: str
) -> tuple[list[PlannedRun], list[PlannedRun]]:
    """Return the Runs to pack and the Runs in jobs of their own; under auto, Series that fill a node are such jobs."""
    if on != "auto":
        return (list(runs), []) if on == "ray" else ([], list(runs))
    cluster = profile.cluster()
    packed: list[PlannedRun] = []
    apart: list[PlannedRun] = []
    for members in by_series(runs).values():
        fills_a_node = demand_of(members, cluster).devices >= cluster.devices_a_node
        (apart if fills_a_node else packed).extend(members)
    return packed, apart


def describe_shares(
    runs: Sequence[PlannedRun], profile: Profile, on: str, nodes: int | None = None
) -> list[str]:
    """Describe the packed Runs and the others, a sentence each; raises what `choose_allocation` raises."""
    packed, apart = share_out(runs, profile, on)
    said = []
    if packed:
        allocation = choose_allocation(packed, profile, nodes)
        said.append(f"{_counted(packed)} packed in one job of {duration(allocation.hours)} on {allocation}")
    if apart:
        said.append(f"{_counted(apart)} in jobs of their own")
    return said


def describe_packing(runs: Sequence[PlannedRun], cluster: Cluster, where: str) -> list[str]:
    """Describe Runs packed on a Ray that takes a whole cluster, in one sentence; no sentence without Runs."""
    devices = _nodes_with(cluster.nodes, cluster.devices_a_node, cluster.device_kind)
    return [f"{_counted(runs)} packed on {where}: {devices}"] if runs else []


def choose_allocation(runs: Sequence[PlannedRun], profile: Profile, nodes: int | None = None) -> Allocation:
    """Return the allocation for these Runs; see `allocate`."""
    cluster = profile.cluster()
    return allocate([demand_of(members, cluster) for members in by_series(runs).values()], profile, nodes)


def allocate(demands: Sequence[Demand], profile: Profile, nodes: int | None = None) -> Allocation:
    """Return an allocation for these Series in which no node stands idle, of at most `nodes` nodes.

    Raises InputError where a Series does not fit.
    """
    cluster = profile.cluster()
    a_node, kind, most = cluster.devices_a_node, cluster.device_kind, nodes or profile.most_nodes
    at_once = math.ceil(sum(demand.devices for demand in demands) - 1e-9)
    widest = max(demands, key=lambda demand: demand.devices)
    here = f"a job of {counted(most, 'node')} of {profile.name}" if nodes is None else f"--nodes {nodes}"
    if widest.devices > a_node * most:
        has = f"{'is' if a_node * most == 1 else 'are'} {a_node * most}"
        raise InputError(f"{here}: {widest.name} takes {widest.devices:g} {kind}s, and there {has}")
    spread = max(demands, key=lambda demand: demand.nodes)
    if spread.nodes > most:
        ranks = f"{counted(spread.ranks, 'rank')} of {spread.share:g} {kind}s"
        raise InputError(f"{here}: {spread.name} has {ranks}, which take {spread.nodes} nodes")
    if nodes is None:
        wanted = min(at_once, _useful(demands))
        enough = -(-wanted // a_node)
    else:  # more nodes than devices in use, or than Series can use, would stand idle
        wanted = at_once
        enough = min(at_once, sum(demand.nodes for demand in demands))
    taken = min(most, max(enough, spread.nodes))
    each = min(a_node, max(-(-wanted // taken), math.ceil(min(widest.devices, a_node))))
    shape = Shape(
        nodes=taken,
        ranks=taken * each,
        threads=max(1, cluster.cores // a_node),
        memory_gib=min(cluster.memory_gib, round(cluster.memory_gib * each / a_node + RAY_GIB, 2)),
    )
    longest = max(demand.hours.high for demand in demands)
    bound = sum(demand.hours.high * demand.devices for demand in demands) / shape.ranks + longest
    hours = min(profile.hours_in(profile.partitions_for(taken)), bound + SLACK_HOURS)
    return Allocation(shape, hours, kind)


def _counted(runs: Sequence[PlannedRun]) -> str:
    return f"{counted(len(runs), 'run')} in {counted(len(by_series(runs)), 'series')}"


def _nodes_with(nodes: int, devices: int, kind: str) -> str:
    return f"{counted(nodes, 'node')} with {counted(devices, kind)}{' each' if nodes > 1 else ''}"


def _useful(demands: Sequence[Demand]) -> int:
    """Number of devices beyond which the longest Series alone decides the time."""
    longest = max(demand.hours.expected for demand in demands)
    work = sum(demand.hours.expected * demand.devices for demand in demands)
    widest = max(demand.devices for demand in demands)
    return max(math.ceil(widest), math.ceil(work / max(longest, BRIEF_HOURS) - 1e-9))
