"""Bad nodes: recognise failures that are a node's and not a Run's, and remember the nodes of a study that had one.

control.jsonl holds them: a `bad_node` event with the node, the reason and the Runs that met it, and a `forgot_node`
event once the user has the study use the node again. Former versions ignore both.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from harness.record.control import Control
from harness.record.root import Root
from ssmttm.errors import InputError

NODE_FAILURES = "SSMSCALE_NODE_FAILURES"
"""Environment variable of a job: the profile's own patterns, a JSON list."""
MOST_BAD_NODES = 3
"""Bad nodes that a task meets before its Runs fail."""
NOT_THERE = "is not there on this node: its file system is not mounted"
PATTERNS = (
    # The driver reports an error by its number; 13, 31, 43 and 45 are errors of the program (NVIDIA, Xid Errors).
    r"\bXid\b(?!(?:\s*\([^)]*\))?\D{0,3}(?:13|31|43|45)\b)",
    r"fallen off the bus|\bGPU is lost\b|Unable to determine the device handle",
    r"uncorrectable.{0,20}\b(?:ECC|NVLink|memory|DRAM|SRAM)\b",
    r"CUDA error:.*\b(?:ECC|NVLink|system not yet initialized|devices are busy or unavailable)\b",
    r"\bNVLink\b.*\b(?:fatal|failed|failure)\b",
    r"Driver/library version mismatch",
    r"Stale file handle|Cannot send after transport endpoint shutdown",
    re.escape(NOT_THERE),
)
"""Patterns of a line that tells of a node's failure: texts of the NVIDIA driver, CUDA, NFS and Lustre."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:+-]*")
"""Form of a node's name; others may write control.jsonl, and sbatch gets these names."""


class NodeFailure(Exception):
    """This node has failed, for the reason given, and not the Run."""


class BadNode(NamedTuple):
    """A node that a study avoids."""

    name: str
    reason: str
    t: float
    """Time at which it last failed, seconds since 1970."""

    def __str__(self) -> str:
        return f"{self.name} ({datetime.fromtimestamp(self.t):%Y-%m-%d %H:%M}: {self.reason})"


def node_failure_in(text: str) -> str | None:
    """Return the last line of a text that tells of a node's failure, at most 300 characters; None without one.

    The last line of a traceback is the error itself.
    """
    own = json.loads(os.environ.get(NODE_FAILURES, "[]"))
    pattern = re.compile("|".join(f"(?:{one})" for one in (*PATTERNS, *own)))
    return next((line.strip()[:300] for line in reversed(text.splitlines()) if pattern.search(line)), None)


def need_on_node(path: Path) -> None:
    """Raise NodeFailure if a file or folder that the submission saw is not there."""
    if not path.exists():
        raise NodeFailure(f"{path}: {NOT_THERE}")


def remember_node(control: Control, node: str, reason: str, runs: Sequence[str], job_id: str) -> None:
    """Record that a job which trains these Runs met a bad node."""
    control.append("bad_node", node=node, reason=reason, runs=list(runs), job_id=job_id)


def bad_nodes_in(events: Iterable[Mapping[str, Any]]) -> dict[str, BadNode]:
    """Return the nodes that the events of a control.jsonl remember, by name."""
    found: dict[str, BadNode] = {}
    for event in events:
        name = str(event.get("node", ""))
        if event["event"] == "bad_node" and NAME.fullmatch(name):
            found[name] = BadNode(name, str(event.get("reason", "")), float(event["t"]))
        elif event["event"] == "forgot_node":
            found.pop(name, None)
    return found


def nodes_met_in(events: Iterable[Mapping[str, Any]], runs: Iterable[str]) -> list[str]:
    """Return the bad nodes that jobs of these Runs met since the Runs were last retried, oldest first."""
    wanted, met = set(runs), list[str]()
    for event in events:
        if not wanted & set(event.get("runs", ())):
            continue
        if event["event"] == "retried":
            met = []
        elif event["event"] == "bad_node":
            met.append(str(event.get("node")))
    return met


def remembered(root: Root) -> dict[str, dict[str, BadNode]]:
    """Return the bad nodes that each study of a ROOT remembers, by study; studies without any are left out."""
    controls = sorted(root.path.glob("studies/*/control.jsonl"))
    found = {path.parent.name: bad_nodes_in(Control(path).read()) for path in controls}
    return {study: nodes for study, nodes in found.items() if nodes}


def forget_node(root: Root, node: str) -> list[str]:
    """Have every study of a ROOT use a node again; returns these studies. Raises InputError if none avoids it."""
    held = remembered(root)
    studies = [study for study, nodes in held.items() if node in nodes]
    if not studies:
        known = ", ".join(sorted({name for nodes in held.values() for name in nodes})) or "none"
        raise InputError(f"--forget-node {node}: no study under {root.path} avoids it; avoided: {known}")
    for study in studies:
        root.control(study).append("forgot_node", node=node)
    return studies
