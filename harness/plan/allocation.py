"""The size of an allocation worth asking for when Series are packed into one, and its time.

More devices than Series can use at once stand idle, and so do those that are left when only the longest Series still
trains: no number of them ends sooner than that. How long it takes is bounded by what any schedule that leaves no device
idle while something waits needs at most, the work shared out evenly and the longest Series after it (Graham 1969).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from harness.common.format import NOTHING, Estimate, counted, duration
from harness.plan.cluster import Cluster, Profile, ranks_a_node
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
"""Work that would be over sooner gets fewer devices: nodes are waited for, and starting on them takes minutes."""
RAY_GIB = 2.0
"""Memory of a node that Ray's own processes take beside the workers."""
SLACK_HOURS = 0.25
"""Asked for on top: Ray and the first workers start meanwhile."""


@dataclass(frozen=True)
class Demand:
    """Demand of one Series on an allocation."""

    name: str
    """Size and architecture, as a user knows it."""
    ranks: int
    share: float
    """Devices a rank takes: a GPU or a part of one, or CPU cores where there are no GPUs."""
    hours: Estimate
    nodes: int
    """Nodes its ranks need at least: a rank's cores are those of one node."""

    @property
    def devices(self) -> float:
        """Devices it takes."""
        return self.ranks * self.share


@dataclass(frozen=True)
class Allocation:
    """The request to SLURM for a whole study."""

    shape: Shape
    hours: float
    """Time asked for; what is not done by then goes on when the job has been requeued."""
    kind: str
    """Name of a device: GPU or core."""

    def __str__(self) -> str:
        devices = counted(self.shape.ranks_a_node, self.kind)
        return f"{counted(self.shape.nodes, 'node')} with {devices}{' each' if self.shape.nodes > 1 else ''}"


def demand_of(runs: Sequence[PlannedRun], cluster: Cluster) -> Demand:
    """Demand of the Runs of one Series together."""
    one = runs[0]
    point, ranks, threads = one.status.point, one.layout.ranks, one.layout.threads
    share = one.size.resources.gpu_fraction if cluster.gpus else float(min(threads, cluster.cores))
    name, hours = f"{point.size} ({point.architecture})", sum((run.hours for run in runs), NOTHING)
    return Demand(name, ranks, share, hours, -(-ranks // ranks_a_node(cluster, threads)))


def share_out(
    runs: Sequence[PlannedRun], profile: Profile, on: str
) -> tuple[list[PlannedRun], list[PlannedRun]]:
    """Runs whose Series are packed, and those whose Series are jobs of their own, as by auto is what takes a node."""
    if on != "auto":
        return (list(runs), []) if on == "ray" else ([], list(runs))
    cluster = profile.cluster()
    packed: list[PlannedRun] = []
    apart: list[PlannedRun] = []
    for members in by_series(runs).values():
        takes_a_node = demand_of(members, cluster).devices >= _devices_a_node(cluster)
        (apart if takes_a_node else packed).extend(members)
    return packed, apart


def describe_shares(
    runs: Sequence[PlannedRun], profile: Profile, on: str, nodes: int | None = None
) -> list[str]:
    """A sentence for what is packed and one for what is not; raises what `choose_allocation` raises."""
    packed, apart = share_out(runs, profile, on)
    said = []
    if packed:
        allocation = choose_allocation(packed, profile, nodes)
        said.append(f"{_counted(packed)} packed in one job of {duration(allocation.hours)} on {allocation}")
    if apart:
        said.append(f"{_counted(apart)} in jobs of their own")
    return said


def describe_packing(runs: Sequence[PlannedRun], cluster: Cluster, where: str) -> list[str]:
    """A sentence for what is packed on a Ray that takes all of a cluster; nothing where nothing is left."""
    if not runs:
        return []
    devices = counted(_devices_a_node(cluster), _device(cluster))
    each = " each" if cluster.nodes > 1 else ""
    return [f"{_counted(runs)} packed on {where}: {counted(cluster.nodes, 'node')} with {devices}{each}"]


def choose_allocation(runs: Sequence[PlannedRun], profile: Profile, nodes: int | None = None) -> Allocation:
    """The allocation for these Runs; see `allocate`."""
    cluster = profile.cluster()
    return allocate([demand_of(members, cluster) for members in by_series(runs).values()], profile, nodes)


def allocate(demands: Sequence[Demand], profile: Profile, nodes: int | None = None) -> Allocation:
    """Return the allocation for these Series, on so many nodes where the user says it, none of which would stand idle.

    Raises InputError where a Series does not fit on them.
    """
    cluster = profile.cluster()
    a_node, kind = _devices_a_node(cluster), _device(cluster)
    most = profile.most_nodes
    at_once = math.ceil(sum(demand.devices for demand in demands) - 1e-9)
    widest = max(demands, key=lambda demand: demand.devices)
    room = a_node * (nodes or most)
    here = f"--nodes {nodes}" if nodes is not None else f"a job of {counted(most, 'node')} of {profile.name}"
    if widest.devices > room:
        raise InputError(
            f"{here}: {widest.name} takes {widest.devices:g} {kind}s, and there {'is' if room == 1 else 'are'} {room}"
        )
    spread = max(demands, key=lambda demand: demand.nodes)
    if spread.nodes > (nodes or most):
        takes = (
            f"{counted(spread.ranks, 'rank')} of {spread.share:g} {kind}s, which take {spread.nodes} nodes"
        )
        raise InputError(f"{here}: {spread.name} has {takes}")
    wanted = at_once if nodes is not None else min(at_once, _useful(demands))
    # Of nodes that a user names no more are of use than there are devices in use, and Series to use them.
    filled = min(at_once, sum(demand.nodes for demand in demands))
    taken = min(nodes or most, max(filled if nodes is not None else -(-wanted // a_node), spread.nodes))
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


def _useful(demands: Sequence[Demand]) -> int:
    """Devices beyond which the longest Series alone says when all is over."""
    longest = max(demand.hours.expected for demand in demands)
    work = sum(demand.hours.expected * demand.devices for demand in demands)
    widest = max(demand.devices for demand in demands)
    return max(math.ceil(widest), math.ceil(work / max(longest, BRIEF_HOURS) - 1e-9))


def _devices_a_node(cluster: Cluster) -> int:
    return cluster.gpus or cluster.cores


def _device(cluster: Cluster) -> str:
    return "GPU" if cluster.gpus else "core"
