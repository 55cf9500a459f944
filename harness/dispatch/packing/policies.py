"""The policy that a packing should follow from here: those that are likely to do well are tried in simulated time."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import replace

from harness.dispatch.packing.devices import DEVICE, Room
from harness.dispatch.packing.simulate import EPSILON, Lane, Outlook, Policy, Schedule, Shapes

BUDGET = 1500
"""Pieces that are followed to their end for one decision, over all policies: some 30 ms."""
PLAIN = (
    Policy(None, "longest"),
    Policy(None, "widest"),
    Policy(None, "heaviest"),
    Policy(None, "narrowest"),
    Policy(None, "longest", keeps_warm=False),
    Policy(None, "widest", keeps_warm=False),
)


def look_ahead(shapes: Shapes, room: Room, lanes: Sequence[Lane], startup: float) -> Outlook:
    """The best outlook there is under the policies that there is time for, the likeliest first."""
    pieces = sum(len(queue) for queue in shapes.queues) + len(lanes)
    tries = max(3, BUDGET // pieces)
    best: tuple[Outlook, Policy] | None = None
    tried: set[Policy] = set()

    def attempt(policy: Policy) -> bool:
        nonlocal best
        if policy in tried or len(tried) >= tries:
            return False
        tried.add(policy)
        found = Schedule(shapes, room, lanes, startup, policy).run(best[0].end if best else math.inf)
        if found is None or (best is not None and found.score >= best[0].score):
            return False
        best = (found, policy)
        return True

    for policy in _policies(shapes, room, lanes):
        attempt(policy)
    while best is not None and any(attempt(policy) for policy in _neighbours(best[1], shapes)):
        pass
    return best[0] if best else Outlook(0.0, 0, 0.0, ())


def _policies(shapes: Shapes, room: Room, lanes: Sequence[Lane]) -> Iterator[Policy]:
    """No shares at all, what stands now, and devices shared out to the shapes by the work that is left of each."""
    yield PLAIN[0]
    yield PLAIN[1]
    kinds = range(len(shapes.needs))
    standing = tuple(sum(lane.shape == kind for lane in lanes) for kind in kinds)
    shares = _shares(shapes, room, lanes)
    yield from (Policy(targets, "widest") for targets in shares[:2])
    yield Policy(standing, "widest")
    yield from PLAIN[2:]
    for targets in shares:
        yield Policy(targets, "widest")
        yield Policy(targets, "longest")


def _shares(shapes: Shapes, room: Room, lanes: Sequence[Lane]) -> list[tuple[int, ...]]:
    """Numbers of groups of each shape that share the devices out by work, those first that should end soonest."""
    widths = [need.width for need in shapes.needs]
    work = [queue[0] for queue in shapes.work]
    devices = float(sum(room.whole)) + sum(left for node in room.shared for left in node.values()) / DEVICE
    for lane in lanes:
        work[lane.shape] += lane.until * widths[lane.shape]
        devices += widths[lane.shape]
    choices = []
    for kind, queue in enumerate(shapes.queues):
        exact = devices * work[kind] / sum(work) / widths[kind]
        around = {math.floor(exact), math.ceil(exact)} if queue else {0}
        choices.append(sorted({min(count, len(queue)) for count in around}))
    found = []
    for counts in itertools.islice(itertools.product(*choices), 256):
        if sum(map(operator.mul, counts, widths)) <= devices + EPSILON:
            ends = [
                left / (count * width) if count else left / width + sum(work) / max(devices, 1)
                for left, count, width in zip(work, counts, widths, strict=True)
                if left
            ]
            found.append((max(ends), counts))
    return [counts for _, counts in sorted(found)]


def _neighbours(policy: Policy, shapes: Shapes) -> Iterator[Policy]:
    """Policies that differ in one thing."""
    for order in ("longest", "widest", "heaviest", "narrowest"):
        yield replace(policy, order=order)
    yield replace(policy, keeps_warm=not policy.keeps_warm)
    for kind, queue in enumerate(shapes.queues if policy.targets is not None else ()):
        for step in (1, -1):
            targets = list(policy.targets or ())
            targets[kind] += step
            if 0 <= targets[kind] <= len(queue) + 1:
                yield replace(policy, targets=tuple(targets))
