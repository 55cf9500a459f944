"""Where a submission goes, from what a user says with --on, --cluster, --ray-address, --nodes and --snapshot.

Where a study was last submitted to: what `retry` takes for options that it is not given.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace

from harness.common.console import errors
from harness.common.extras import missing_package
from harness.common.format import counted
from harness.dispatch.base import Backend, SubmitTarget
from harness.dispatch.registry import BACKENDS, open_backend
from harness.plan.cluster import lasting_name, load_profile, profile_names
from harness.record.control import Control
from harness.record.registry import ResolvedStudy
from ssmttm.errors import InputError

OFFERED = ("local", "slurm", "ray")
"""Backends of ours by their names for the user: of ray there are three, told apart by what else is said."""


def target_of(
    on: str,
    cluster: str | None,
    snapshot: bool | None = None,
    nodes: int | None = None,
    *,
    ray_address: str | None = None,
) -> SubmitTarget:
    """Return the target that is meant. Raises InputError for what does not go together."""
    if on not in BACKENDS and on != "auto":
        others = [name for name in BACKENDS if name.partition("-")[0] not in OFFERED]
        known = ", ".join((*OFFERED, *others))
        raise InputError(f"--on {on}: there is no such dispatcher; there are {known} and auto")
    if nodes is not None and on in {"local", "slurm"}:
        what = "a series' job takes the nodes it needs" if on == "slurm" else "here there is one"
        raise InputError(f"--nodes {nodes}: is for series that are packed, by --on ray or auto; {what}")
    if on == "ray":
        check_ray("--on ray")
    if ray_address is not None:
        for option, value in (("--cluster", cluster), ("--nodes", nodes), ("--snapshot", snapshot)):
            if value is not None:
                raise InputError(
                    f"{option} {value}: is for SLURM's jobs; --ray-address has a Ray that is there already"
                )
        if on != "ray":
            raise InputError(f"--ray-address {ray_address}: goes with --on ray, and not with --on {on}")
        return SubmitTarget("ray", ray_address=ray_address)
    if on == "local" or (on in {"ray", "auto"} and cluster is None):
        if snapshot:
            raise InputError("--snapshot: is for jobs that wait in a queue; here training begins at once")
        if nodes is not None:
            raise InputError(
                f"--nodes {nodes}: says how many of a cluster's; name the cluster with --cluster"
            )
        return SubmitTarget("ray" if on == "ray" else "local")
    if cluster is None and on not in {"slurm", "auto"}:
        return SubmitTarget(on)
    if cluster is None:
        raise InputError(
            f"--on {on}: name the cluster with --cluster; there are {', '.join(profile_names())}"
        )
    profile = load_profile(cluster)
    if nodes is not None and nodes > profile.most_nodes:
        most = counted(profile.most_nodes, "node")
        raise InputError(f"--nodes {nodes}: {profile.name} gives a job at most {most}")
    if snapshot is not None:
        profile = profile.model_copy(update={"snapshot": snapshot})
    if on == "auto" and not has_ray():
        errors.print("warning: Ray is not installed: every series is submitted as a job of its own")
        on = "slurm"
    return SubmitTarget(on, profile, cluster, nodes)


def backends_of(target: SubmitTarget, resolved: ResolvedStudy) -> list[Backend]:
    """Open the backends that train a study there: one, or by auto one for large Series and one that packs others."""
    names = [target.on]
    if target.on == "auto":
        names = ["slurm", "ray"]
    elif target.on == "ray" and target.profile is None:
        names = ["ray-here" if target.ray_address is None else "ray-cluster"]
    folder, jobs = resolved.root.study(resolved.study.name), resolved.study.resources.jobs
    return [open_backend(name, folder, target, jobs) for name in names]


def has_ray() -> bool:
    """Whether Ray is installed here, and so where jobs run with this Python."""
    return importlib.util.find_spec("ray") is not None


def check_ray(where: str) -> None:
    """Raise InputError naming what installs Ray where it is not."""
    if not has_ray():
        raise InputError(f"{where}: {missing_package(ModuleNotFoundError(name='ray'))}")


@dataclass(frozen=True)
class Options:
    """What a user says of where a study is to be trained, or said; None for what was not said."""

    on: str | None = None
    cluster: str | None = None
    nodes: int | None = None
    ray_address: str | None = None


def last_options(resolved: ResolvedStudy) -> Options | None:
    """The options of the study's newest submission; None where there was none."""
    control = Control(resolved.root.study(resolved.study.name) / "control.jsonl")
    for event in reversed(control.read()):
        if event["event"] == "submitted":
            cluster, nodes, address = (event.get(key) for key in ("cluster", "nodes", "ray_address"))
            return Options(
                on=str(event.get("on", event.get("dispatcher", "local"))),
                cluster=cluster if isinstance(cluster, str) else None,
                nodes=nodes if isinstance(nodes, int) else None,
                ray_address=address if isinstance(address, str) else None,
            )
    return None


def as_before(said: Options, before: Options | None, default: str | None) -> tuple[Options, str]:
    """What is meant by options of which some were not said, and in words what of it is as it was before.

    default: the environment's cluster, for what nobody ever said; what was submitted elsewhere stays there.
    """
    if said.ray_address is not None:
        return replace(said, on=said.on or "ray"), ""
    if before is None:
        cluster = said.cluster or default
        return replace(said, on=said.on or ("auto" if cluster else "local"), cluster=cluster), ""
    on = said.on or ("auto" if before.on == "local" and said.cluster else before.on)
    meant, kept = replace(said, on=on), []
    if on == "local":
        return meant, ""
    if said.cluster is None and before.cluster is not None:
        meant = replace(meant, cluster=before.cluster)
        kept.append(f"cluster {before.cluster}")
    elif said.cluster is None and on == "ray" and before.ray_address is not None:
        meant = replace(meant, ray_address=before.ray_address)
        kept.append(f"Ray at {before.ray_address}")
    elif said.cluster is None and said.on is not None:
        meant = replace(meant, cluster=default)
    is_packed_there = (
        on in {"ray", "auto"}
        and meant.cluster is not None
        and before.cluster in {meant.cluster, lasting_name(meant.cluster)}
    )
    if is_packed_there and said.nodes is None and before.nodes is not None:
        meant = replace(meant, nodes=before.nodes)
        kept.append(f"up to {counted(before.nodes, 'node')}")
    return meant, f"on {on}, {', '.join(kept)}, as it was last submitted" if kept else ""
