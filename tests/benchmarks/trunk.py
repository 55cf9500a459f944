"""Four lengths of one run on a shared trunk, against the same four runs trained alone."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harness.record import checkpoints
from harness.record.root import Root
from harness.train import checkpoint, loop
from harness.train.engine import Engine
from tests.benchmarks.measure import Row, clocked, spent_in, times
from tests.corpora import write_tiny_corpus
from tests.harness.trainer import losses, train
from tests.studies import Fields, tiny_study

ITERATIONS = (40, 80, 160, 320)
BRANCHING = ("save", "inspect", "load")  # writing a checkpoint, checking it, loading it back
WATCHED = ((Engine, "step"), (checkpoint, "save"), (checkpoints, "inspect"), (loop, "load"))


@dataclass(frozen=True)
class Training:
    """One training of one side: its wall time, losses in the order of ITERATIONS, and seconds of watched calls."""

    wall: float
    losses: list[float]
    spent: Mapping[str, Sequence[float]]

    @property
    def steps(self) -> int:
        """Number of optimiser steps."""
        return len(self.spent["step"])

    def total(self, *names: str) -> float:
        """Return the seconds spent in the watched functions of those names."""
        return sum(sum(self.spent[name]) for name in names)


def run(*, quick: bool) -> Iterator[Row]:
    """Yield steps and seconds of both, the cost of branching against its saving, and the losses, which are equal."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tiny_corpus(folder / "corpus")
        _train(folder, [("warm-up", ITERATIONS[:1])])
        pairs = [(_shared(folder, number), _alone(folder, number)) for number in range(1 if quick else 3)]
    shared, alone = pairs[0]
    if shared.losses != alone.losses:
        raise AssertionError(f"the sides end apart: {shared.losses} on a trunk, {alone.losses} alone")

    lengths = ", ".join(map(str, ITERATIONS))
    ratio = alone.steps / shared.steps
    yield Row(f"trunk: steps of runs of {lengths}", str(shared.steps), str(alone.steps), f"{ratio:.3g}")
    walls = [np.array([side.wall for side in sides]) for sides in zip(*pairs, strict=True)]
    yield times("trunk: wall time of the four", *walls)
    loads = len(shared.spent["load"])
    costs = np.array([ours.total(*BRANCHING) - theirs.total(*BRANCHING) for ours, theirs in pairs])
    savings = np.array([theirs.total("step") - ours.total("step") for ours, theirs in pairs])
    yield times(f"trunk: cost of {loads} returns, against the steps saved", costs, savings)
    for name, what in zip(BRANCHING, ("save", "check", "load back"), strict=True):
        each = np.array([np.median(ours.spent[name]) for ours, _ in pairs])
        step = np.array([np.median(ours.spent["step"]) for ours, _ in pairs])
        yield times(f"trunk: {what} a checkpoint, against one step", each, step)
    ours, theirs = (" ".join(f"{loss:.4f}" for loss in side.losses) for side in (shared, alone))
    what = "trunk: held-out loss of the longest"
    yield Row(what, ours.split()[-1], theirs.split()[-1], "all four equal to the bit")


def _shared(folder: Path, number: int) -> Training:
    return _train(folder, [(f"shared-{number}", ITERATIONS)])


def _alone(folder: Path, number: int) -> Training:
    return _train(folder, [(f"alone-{number}-{count}", (count,)) for count in ITERATIONS])


def _train(folder: Path, roots: Sequence[tuple[str, Sequence[int]]]) -> Training:
    """Train the given iterations in each root, one root after the other."""
    studies = [(Root(folder / name), _study(folder / "corpus", iterations)) for name, iterations in roots]
    with spent_in(*WATCHED) as spent:
        wall = clocked(lambda: [train(root, study) for root, study in studies])
    return Training(wall, [loss for root, study in studies for loss in losses(root, study)], spent)


def _study(corpus: Path, iterations: Sequence[int]) -> Fields:
    fields = tiny_study(corpus)
    fields["model"] |= {"d_state": 16, "ssm_head_dim": 16, "head_dim": 16}
    fields["grid"] |= {"sizes": {"s": {"n_blocks": 2, "d_model": 32}}, "iterations": list(iterations)}
    fields["training"]["schedule"] = {"warmup": 10}
    return fields | {"tracking": {"log_every": 20}}
