"""How near a packing comes to the least time there can be, against longest first without looking ahead.

Simulated time on two nodes of four GPUs: 24 Series of one, two and four GPUs in turn, drawn anew each round. The bound
is the longest Series or all GPU-seconds on all GPUs; the start of groups counts as loss. Only what a decision costs is
measured in real time.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence

import numpy as np

from harness.dispatch.base import Task
from harness.dispatch.packing.decide import Action, Feed, Group, Node, Piece, Start, Stop, decide
from harness.dispatch.packing.pace import Pace
from tests.benchmarks.measure import Row, as_time
from tests.harness.packings import Decide, Simulation, lower_bound, mixed

NODES = [Node("a", 4), Node("b", 4)]
STARTUPS = (0.0, 2.0, 10.0, 30.0)
"""Seconds; a Series takes 30 to 300, and 165 on average."""


def run(*, quick: bool) -> Iterator[Row]:
    """Rows for exact estimates, for wrong ones, and for what a decision takes."""
    seeds = range(8 if quick else 60)
    for startup in STARTUPS:
        ours, theirs = (
            [_ratio(mixed(seed), startup, how) for seed in seeds] for how in (decide, longest_first)
        )
        yield _row(f"packing: time over bound, groups start in {startup:g} s", ours, theirs)
    pairs = [(_wrong(seed, corrected=True), _wrong(seed, corrected=False)) for seed in seeds]
    ours, theirs = ([pair[side] for pair in pairs] for side in (0, 1))
    yield _row("packing: estimates off by 0.5 to 2, corrected or not", ours, theirs)
    for count, sizes in ((24, [4, 4]), (300, [8] * 4)):
        nodes = [Node(f"n{at}", float(size)) for at, size in enumerate(sizes)]
        seconds = [_seconds(mixed(seed, count), nodes, decide) for seed in range(5)]
        plain = [_seconds(mixed(seed, count), nodes, longest_first) for seed in range(5)]
        what = f"packing: a decision, {count} Series on {sum(sizes)} GPUs"
        yield Row(what, as_time(float(np.median(seconds))), as_time(float(np.median(plain))), "CPU time")


def longest_first(
    waiting: Sequence[Piece], groups: Sequence[Group], nodes: Sequence[Node], startup: float
) -> list[Action]:
    """The longest Series on the first node that has room; nothing overtakes one that waits."""
    del startup
    actions: list[Action] = []
    idle = [group for group in groups if group.busy is None]
    free = {node.key: node.devices for node in nodes}
    for group in groups:
        free[group.nodes[0]] -= group.shape.ranks
    for piece in sorted(waiting, key=lambda piece: (-piece.seconds, piece.key)):
        warm = next((group for group in idle if group.shape == piece.shape), None)
        if warm is not None:
            idle.remove(warm)
            actions.append(Feed(warm, piece))
            continue
        while (node := next((key for key in free if free[key] >= piece.shape.ranks), None)) is None and idle:
            group = idle.pop()
            actions.append(Stop(group))
            free[group.nodes[0]] += group.shape.ranks
        if node is None:
            break
        free[node] -= piece.shape.ranks
        actions.append(Start(piece, (node,) * piece.shape.ranks))
    return actions


def _ratio(pieces: Sequence[Piece], startup: float, how: Decide) -> float:
    return Simulation(pieces, list(NODES), startup, how).run() / lower_bound(pieces, NODES)


def _wrong(seed: int, *, corrected: bool) -> float:
    """The ratio where each of three architectures is slower or faster than expected by a factor of its own."""
    pieces = mixed(seed)
    rolled = random.Random(seed)
    factors = [2 ** rolled.uniform(-1, 1) for _ in range(3)]
    kinds = {piece.key: rolled.randrange(3) for piece in pieces}
    actual = {piece.key: piece.seconds * factors[kinds[piece.key]] for piece in pieces}
    pace = Pace()

    def job(piece: Piece) -> Task:
        architecture = str(kinds[piece.key])
        return Task(series_id=piece.key, run_dirs=(), seconds=piece.seconds, architecture=architecture)

    simulation = Simulation(pieces, list(NODES), 10.0, actual=actual)
    if corrected:
        simulation.left = lambda piece, elapsed: pace.left(job(piece), elapsed)
        simulation.finished = lambda piece, seconds: pace.finished(job(piece), seconds)
    return simulation.run() / lower_bound(pieces, NODES, actual)


def _seconds(pieces: Sequence[Piece], nodes: Sequence[Node], how: Decide) -> float:
    """CPU seconds of the first decision, which has most to decide."""
    begun = time.process_time()
    how(pieces, [], nodes, 10.0)
    return time.process_time() - begun


def _row(what: str, ours: Sequence[float], theirs: Sequence[float]) -> Row:
    def told(ratios: Sequence[float]) -> str:
        return f"{np.median(ratios):.3f} {max(ratios):.3f}"

    gained = np.array(theirs) / np.array(ours)
    text = f"{np.median(gained):.3f} ({gained.min():.3f} to {gained.max():.3f}); columns: median, worst"
    return Row(what, told(ours), told(theirs), text)
