"""Where a study was last submitted to: what `retry` takes for options that it is not given."""

from __future__ import annotations

from dataclasses import dataclass, replace

from harness.control import Control
from harness.profile import lasting_name
from harness.submission import ResolvedStudy
from harness.terminal import counted


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
