"""Time of a packing over its lower bound, against longest first with plain backfill.

Simulated time on two nodes of four GPUs: 24 Series of one, two and four GPUs in turn, drawn anew each round. The bound
is the longest Series or all GPU-seconds on all GPUs; the start of groups counts as loss. The cost of a decision is
real time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np

from harness.dispatch.packing import Action, Feed, Group, Node, Start, Stop, WaitingTask, decide
from tests.benchmarks.measure import Row, as_time
from tests.harness.packings import Decide, Simulation, lower_bound, mixed

NODES = [Node("a", 4), Node("b", 4)]
STARTUPS = (0.0, 2.0, 10.0, 30.0)
"""Seconds; a Series takes 30 to 300, and 165 on average."""


def run(*, quick: bool) -> Iterator[Row]:
    """Yield rows for packings, and for the time of a decision."""
    seeds = range(8 if quick else 60)
    for startup in STARTUPS:
        ours, theirs = (
            [_ratio(mixed(seed), startup, how) for seed in seeds] for how in (decide, longest_first)
        )
        yield _row(f"packing: time over bound, groups start in {startup:g} s", ours, theirs)
    for count, sizes in ((24, [4, 4]), (300, [8] * 4)):
        nodes = [Node(f"n{at}", float(size)) for at, size in enumerate(sizes)]
        seconds = [_seconds(mixed(seed, count), nodes, decide) for seed in range(5)]
        plain = [_seconds(mixed(seed, count), nodes, longest_first) for seed in range(5)]
        what = f"packing: a decision, {count} Series on {sum(sizes)} GPUs"
        yield Row(what, as_time(float(np.median(seconds))), as_time(float(np.median(plain))), "CPU time")


def longest_first(
    waiting: Sequence[WaitingTask], groups: Sequence[Group], nodes: Sequence[Node], startup: float
) -> list[Action]:
    """Place the longest Series on the first node with enough free devices; shorter ones overtake one that waits."""
    del startup
    actions: list[Action] = []
    idle = [group for group in groups if group.busy is None]
    free = {node.key: node.devices for node in nodes}
    for group in groups:
        free[group.nodes[0]] -= group.request.ranks

    def node_for(ranks: int) -> str | None:
        return next((key for key in free if free[key] >= ranks), None)

    for task in sorted(waiting, key=lambda task: (-task.seconds, task.key)):
        ranks = task.request.ranks
        warm = next((group for group in idle if group.request == task.request), None)
        if warm is not None:
            idle.remove(warm)
            actions.append(Feed(warm, task))
            continue
        while node_for(ranks) is None and idle:
            group = idle.pop()
            actions.append(Stop(group))
            free[group.nodes[0]] += group.request.ranks
        if (node := node_for(ranks)) is not None:
            free[node] -= ranks
            actions.append(Start(task, (node,) * ranks))
    return actions


def _ratio(tasks: Sequence[WaitingTask], startup: float, how: Decide) -> float:
    return Simulation(tasks, list(NODES), startup, how).run() / lower_bound(tasks, NODES)


def _seconds(tasks: Sequence[WaitingTask], nodes: Sequence[Node], how: Decide) -> float:
    """Return the CPU seconds of the first decision, which is the largest."""
    begun = time.process_time()
    how(tasks, [], nodes, 10.0)
    return time.process_time() - begun


def _row(what: str, ours: Sequence[float], theirs: Sequence[float]) -> Row:
    def told(ratios: Sequence[float]) -> str:
        return f"{np.median(ratios):.3f} {max(ratios):.3f}"

    gained = np.array(theirs) / np.array(ours)
    text = f"{np.median(gained):.3f} ({gained.min():.3f} to {gained.max():.3f}); columns: median, worst"
    return Row(what, told(ours), told(theirs), text)
