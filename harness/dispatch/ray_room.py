"""What the nodes of a Ray cluster have left for us: others may hold a part of them, and Ray seats nobody twice."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from harness.dispatch.packing import Node

SETTLE_SECONDS = 10.0
"""How long something is held before others count as holding it: Ray reports what was let go here a moment later."""


class Others:
    """What is held of each node by somebody else: another study, or whoever shares the cluster."""

    def __init__(self, kind: str) -> None:
        """`kind` is what ranks take: GPU or CPU."""
        self.kind = kind
        self._looks: list[tuple[float, dict[str, float]]] = []

    def leave(self, nodes: Sequence[Node], ours: Mapping[str, float]) -> list[Node]:
        """The nodes with what others leave of them; `ours` is what groups of this process hold or wait for there."""
        now, free = time.monotonic(), available()
        taken = {
            # A node that has just come is not told of yet, and a kind of which nothing is free is left out.
            node.key: node.devices - free[node.key].get(self.kind, 0.0) - ours.get(node.key, 0.0)
            for node in nodes
            if node.key in free
        }
        before = [look for look in self._looks if look[0] < now - SETTLE_SECONDS][-1:]
        self._looks = [
            *before,
            *(look for look in self._looks if look[0] >= now - SETTLE_SECONDS),
            (now, taken),
        ]
        return [replace(node, devices=max(0.0, node.devices - self._held(node.key))) for node in nodes]

    def _held(self, node: str) -> int:
        """Devices of which others have held something all the time; shares of one are rounded by Ray."""
        least = min(taken.get(node, 0.0) for _, taken in self._looks)
        return max(0, math.ceil(least - 0.01))


def available() -> Mapping[str, Mapping[str, Any]]:
    """What Ray says is free of each node's resources, by the nodes' ids."""
    from ray._private.state import available_resources_per_node  # public for developers, and nowhere else

    return dict(available_resources_per_node())
