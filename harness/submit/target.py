"""Choose the target of a submission by --on, --cluster, --ray-address, --nodes and --snapshot.

`retry` takes options that it is not given from the study's last submission.
"""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

from harness.common.console import errors
from harness.common.extras import missing_package
from harness.common.format import counted
from harness.dispatch.base import Backend, SubmitTarget
from harness.dispatch.registry import BACKENDS, open_backend
from harness.plan.cluster import Profile, lasting_name, load_profile, profile_names
from harness.record.registry import ResolvedStudy
from harness.record.trust import believe, doubt
from ssmttm.errors import InputError

OFFERED = ("local", "slurm", "ray")
"""Built-in backends as the user names them; other options choose one of the three Ray backends."""


def target_of(
    on: str,
    cluster: str | None,
    snapshot: bool | None = None,
    nodes: int | None = None,
    *,
    ray_address: str | None = None,
) -> SubmitTarget:
    """Return the target of these options. Raises InputError if they contradict each other."""
    if on not in BACKENDS and on != "auto":
        others = [name for name in BACKENDS if name.partition("-")[0] not in OFFERED]
        known = ", ".join((*OFFERED, *others))
        raise InputError(f"--on {on}: no such backend; choose one of {known} or auto")
    if nodes is not None and on in {"local", "slurm"}:
        why = "the job of a series takes the nodes it needs" if on == "slurm" else "this machine is one node"
        raise InputError(f"--nodes {nodes}: applies to packed series, with --on ray or auto; {why}")
    if on == "ray" and cluster is None:
        _check_ray(None)
    if ray_address is not None:
        for option, value in (("--cluster", cluster), ("--nodes", nodes), ("--snapshot", snapshot)):
            if value is not None:
                raise InputError(
                    f"{option} {value}: applies to SLURM jobs; --ray-address uses an existing Ray"
                )
        if on != "ray":
            raise InputError(f"--ray-address {ray_address}: needs --on ray, not --on {on}")
        return SubmitTarget("ray", ray_address=ray_address)
    if on == "local" or (on in {"ray", "auto"} and cluster is None):
        if snapshot:
            raise InputError("--snapshot: applies to queued jobs; on this machine training begins at once")
        if nodes is not None:
            raise InputError(f"--nodes {nodes}: applies to a cluster; name the cluster with --cluster")
        return SubmitTarget("ray" if on == "ray" else "local")
    if cluster is None and on not in {"slurm", "auto"}:
        return SubmitTarget(on)
    if cluster is None:
        raise InputError(f"--on {on}: name the cluster with --cluster: {', '.join(profile_names())}")
    profile = load_profile(cluster)
    if on == "ray":
        _check_ray(profile)
    if nodes is not None and nodes > profile.most_nodes:
        most = counted(profile.most_nodes, "node")
        raise InputError(f"--nodes {nodes}: {profile.name} allows a job at most {most}")
    if snapshot is not None:
        profile = profile.model_copy(update={"snapshot": snapshot})
    if on == "auto" and not has_ray(profile):
        errors.print("warning: Ray is not installed; each series is submitted as a separate job")
        on = "slurm"
    return SubmitTarget(on, profile, cluster, nodes)


def backends_of(target: SubmitTarget, resolved: ResolvedStudy) -> list[Backend]:
    """Open the backends of a target: one, or with auto one for large Series and one that packs the others."""
    names = [target.on]
    if target.on == "auto":
        names = ["slurm", "ray"]
    elif target.on == "ray" and target.profile is None:
        names = ["ray-here" if target.ray_address is None else "ray-cluster"]
    folder, jobs = resolved.root.study(resolved.study.name), resolved.study.resources.jobs
    return [open_backend(name, folder, target, jobs) for name in names]


def has_ray(profile: Profile | None) -> bool:
    """Return True if Ray is installed here, and so for jobs too, which run with this Python unless in a container."""
    in_image = profile is not None and profile.container is not None
    return in_image or importlib.util.find_spec("ray") is not None


def _check_ray(profile: Profile | None) -> None:
    if not has_ray(profile):
        raise InputError(f"--on ray: {missing_package(ModuleNotFoundError(name='ray'))}")


class Options(NamedTuple):
    """The options that choose a target; None for those the user did not give."""

    on: str | None = None
    cluster: str | None = None
    nodes: int | None = None
    ray_address: str | None = None

    def words(self) -> tuple[str, ...]:
        """Return them as they are typed."""
        given = {"--" + name.replace("_", "-"): value for name, value in self._asdict().items()}
        return tuple(
            word for name, value in given.items() if value is not None for word in (name, str(value))
        )


def last_options(resolved: ResolvedStudy, given: Options) -> Options | None:
    """Return the options of the study's last submission; None if there was none.

    If other users can write their record, raise InputError unless the user has `given` the target, and return None if
    so: a profile that it names has shell lines.
    """
    control = resolved.root.control(resolved.study.name)
    if (given.on == "local" or given.cluster or given.ray_address) and doubt(control.path):
        return None
    for event in reversed(control.read()):
        if event["event"] == "submitted":
            believe(control.path, "where and how runs are trained again", "say that with --on and --cluster")
            cluster, nodes, address = (event.get(key) for key in ("cluster", "nodes", "ray_address"))
            return Options(
                on=str(event.get("on", event.get("dispatcher", "local"))),
                cluster=cluster if isinstance(cluster, str) else None,
                nodes=nodes if isinstance(nodes, int) else None,
                ray_address=address if isinstance(address, str) else None,
            )
    return None


def as_before(given: Options, before: Options | None, default: str | None) -> tuple[Options, str]:
    """Complete the given options by those of the last submission; describe the options taken from it.

    `default` is the cluster of SSMSCALE_CLUSTER, which counts only if neither names one.
    """
    if given.ray_address is not None:
        return given._replace(on=given.on or "ray"), ""
    if before is None:
        cluster = given.cluster or default
        return given._replace(on=given.on or ("auto" if cluster else "local"), cluster=cluster), ""
    on = given.on or ("auto" if before.on == "local" and given.cluster else before.on)
    complete, kept = given._replace(on=on), []
    if on == "local":
        return complete, ""
    if given.cluster is None and before.cluster is not None:
        complete = complete._replace(cluster=before.cluster)
        kept.append(f"cluster {before.cluster}")
    elif given.cluster is None and on == "ray" and before.ray_address is not None:
        complete = complete._replace(ray_address=before.ray_address)
        kept.append(f"Ray at {before.ray_address}")
    elif given.cluster is None and given.on is not None:
        complete = complete._replace(cluster=default)
    is_packed_there = (
        on in {"ray", "auto"}
        and complete.cluster is not None
        and before.cluster in {complete.cluster, lasting_name(complete.cluster)}
    )
    if is_packed_there and given.nodes is None and before.nodes is not None:
        complete = complete._replace(nodes=before.nodes)
        kept.append(f"up to {counted(before.nodes, 'node')}")
    return complete, f"on {on}, {', '.join(kept)}, as in the last submission" if kept else ""
