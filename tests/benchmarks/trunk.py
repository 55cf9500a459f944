"""Four lengths of one run on a shared trunk, against the same four runs trained alone."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from harness.rundir import Root
from harness.training import checkpoint
from harness.training.engine import Engine
from tests.benchmarks.measure import Row, as_time, clocked, times
from tests.corpora import write_tiny_corpus
from tests.harness.trainer import losses, train

ITERATIONS = (40, 80, 160, 320)
BRANCHING = ("save", "problem_with", "load")
WATCHED = ((Engine, "step"), *((checkpoint, name) for name in BRANCHING))
"""An optimiser step; and writing a checkpoint, checking it and loading it back."""

Spent = dict[str, list[float]]


def run(*, quick: bool) -> Iterator[Row]:
    """Steps and seconds of both, what branching costs of that, and whether the losses are equal."""
    rounds = 1 if quick else 3
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tiny_corpus(folder / "corpus")
        _train_alone(folder / "warm", folder / "corpus", ITERATIONS[:1])
        shared_seconds, alone_seconds = [], []
        shared: Spent = {}
        alone: Spent = {}
        for number in range(rounds):
            ours, theirs = folder / f"shared-{number}", folder / f"alone-{number}"
            with stopwatch() as shared:
                shared_seconds.append(clocked(lambda at=ours: _train_shared(at, folder / "corpus")))
            with stopwatch() as alone:
                alone_seconds.append(clocked(lambda at=theirs: _train_alone(at, folder / "corpus", ITERATIONS)))
