"""Cost of the loop against a bare one, of the record (journal and mirror) in it, and of saving checkpoints.

One engine trains in blocks, by turns with and without the record. A block is compared with its neighbour, so that other
load falls on both. The mirror is a process of its own, as under `ssmscale submit`, and is suspended during a block
without it.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import psutil
import torch
import yaml

from harness.common.validation import validate
from harness.record.control import Control
from harness.record.heartbeat import Heartbeat
from harness.record.journal import Journal
from harness.record.registry import resolve
from harness.record.root import Root
from harness.record.status import StatusReader
from harness.study.run import trunk_learning_rate
from harness.study.schema import Study
from harness.tracking.live import MirrorThread
from harness.tracking.store import default_uri
from harness.train.batches import MicroBatch
from harness.train.loop import Outcome, SeriesTrainer
from tests.benchmarks.measure import Row, Seconds, as_time, clocked, spent_in
from tests.corpora import write_tiny_corpus
from tests.harness.trainer import series_folder, train
from tests.studies import Fields

DEMO = Path(__file__).parents[2] / "sweeps" / "demo.yaml"
BLOCK_SECONDS = 1.6
"""The mirror has a round every 3 s, so every block with a mirror has one, which is twice its share."""
SHOW_SECONDS = 1.0
"""Interval at which a submission reads the journals for its display."""
REQUIRED = 0.01
"""Largest share of a step that the record may take."""
REQUIRED_OF_LOOP = 0.03
"""The same for all that the loop does besides making batches and training on them."""
LARGER = {"n_blocks": 6, "d_model": 672, "d_state": 64, "ssm_head_dim": 64, "head_dim": 84}
"""About 30 M parameters."""


def run(*, quick: bool) -> Iterator[Row]:
    """Yield the overhead on a step, the part of it inside the loop, and the cost of saving."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tiny_corpus(folder / "corpus", codebooks=2, frames=256, codebook_size=256)
        taken = _blocks(folder, pairs=25 if quick else 80)
        count = len(taken.wall)
        yield _overhead(f"record: a step of prefix_simba xs, {count} pairs of blocks", np.array(taken.wall))
        yield _overhead(
            f"record: its processor time alone, {count} pairs of blocks", np.array(taken.processor)
        )
        step = float(np.median(np.array(taken.processor)[:, 1]))
        yield Row(
            "record: of it journal, fence, cancellations and heartbeat, a step",
            as_time(taken.inside),
            as_time(step),
            f"{taken.inside / step:.2%} of a step",
        )
        yield _loop_against_bare(folder, pairs=25 if quick else 80)
        yield _share_of_saving(folder, [100, 200] if quick else [100, 200, 400, 800])
        yield _speed_of_saving(folder, rounds=2 if quick else 5)


@dataclass
class Blocks:
    """Seconds a step of each pair of blocks, with the record and without."""

    wall: list[tuple[float, float]] = field(default_factory=list)
    processor: list[tuple[float, float]] = field(default_factory=list)
    """CPU time of the training process and of the kernel for it, which other load hardly changes."""
    inside: float = math.nan
    """Seconds a step in the record's own functions."""


def _demo(folder: Path, size: dict[str, Any], iterations: list[int]) -> dict[str, Any]:
    """Return the demo's study with one prefix_simba of one size, on a corpus of the same shape."""
    fields: Fields = yaml.safe_load(DEMO.read_text(encoding="utf-8"))
    fields["name"] = "overhead"
    fields["corpus"] |= {"path": str(folder / "corpus"), "codec": "rvq"}
    fields["grid"] = {
        "architectures": {"prefix_simba": None},
        "sizes": {"one": size},
        "iterations": iterations,
    }
    return fields


def _smallest() -> dict[str, Any]:
    sizes: dict[str, dict[str, Any]] = yaml.safe_load(DEMO.read_text(encoding="utf-8"))["grid"]["sizes"]
    return sizes["xs"]


def _blocks(folder: Path, pairs: int) -> Blocks:
    """Train the demo's smallest model in blocks; the order within a pair alternates."""
    root, fields, taken = Root(folder / "blocks"), _demo(folder, _smallest(), [10_000_000]), Blocks()
    Control(root.study(fields["name"]) / "control.jsonl").append("submitted", runs=[])

    def measure(trainer: SeriesTrainer, journal: Journal) -> None:
        with _mirroring(root, fields) as mirror:
            steps = _steps_of(BLOCK_SECONDS, trainer)
            for number in range(pairs + 1):  # the first pair warms up
                pair = {}
                for recorded in (True, False) if number % 2 else (False, True):
                    mirror.resume() if recorded else mirror.suspend()
                    start = time.perf_counter(), time.process_time()
                    _walk(trainer, steps, journal if recorded else None)
                    end = time.perf_counter(), time.process_time()
                    pair[recorded] = [
                        (after - before) / steps for before, after in zip(start, end, strict=True)
                    ]
                if number:
                    taken.wall.append((pair[True][0], pair[False][0]))
                    taken.processor.append((pair[True][1], pair[False][1]))
            mirror.suspend()
            watched = (Journal, "append"), (SeriesTrainer, "_agree"), (Heartbeat, "move")
            with spent_in(*watched, clock=time.thread_time) as spent:
                _walk(trainer, steps, journal)
            taken.inside = sum(map(sum, spent.values())) / steps

    _train(root, fields, measure)
    return taken


def _loop_against_bare(folder: Path, pairs: int) -> Row:
    """Return the row of the loop with its journal against batches and optimiser steps alone, in processor time."""
    root, fields = Root(folder / "bare"), _demo(folder, _smallest(), [10_000_000])
    taken: list[tuple[float, float]] = []

    def measure(trainer: SeriesTrainer, journal: Journal) -> None:
        steps = _steps_of(BLOCK_SECONDS / 4, trainer)
        sides = partial(_walk, trainer, steps, journal), partial(_bare, trainer, steps)
        for number in range(pairs + 1):  # the first pair warms up
            pair = [0.0, 0.0]
            for side in (0, 1) if number % 2 else (1, 0):
                start = time.process_time()
                sides[side]()
                pair[side] = (time.process_time() - start) / steps
            if number:
                taken.append((pair[0], pair[1]))

    _train(root, fields, measure)
    what = f"loop: a step against a bare loop's, {pairs} pairs of blocks"
    return _overhead(what, np.array(taken), REQUIRED_OF_LOOP)


def _bare(trainer: SeriesTrainer, steps: int) -> None:
    """Train on with nothing but what every training loop does."""
    from ssmttm.model.loss import codebook_cross_entropy

    def loss_of(part: MicroBatch, n_targets: int) -> torch.Tensor:
        logits = trainer.engine.deepspeed(part.inputs, part.text)
        sums, _ = codebook_cross_entropy(logits, part.targets, smoothing)
        return sums.sum() / n_targets

    smoothing, lr = trainer.first.regularisation.label_smoothing, trainer.first.optimiser.lr
    for _ in range(steps):
        batch = trainer.batches.training_step(trainer.step)
        losses = [partial(loss_of, part, batch.n_targets) for part in batch.micro_batches]
        trainer.engine.step(losses, lr)
        trainer.step += 1


def _overhead(what: str, pairs: Seconds, required: float = REQUIRED) -> Row:
    """Return the row of pairs (count, 2): the median of their relative differences, with a 95 % interval."""
    middle, low, high = median_with_interval(pairs[:, 0] / pairs[:, 1] - 1)
    verdict = "below" if high < required else "not told apart from" if low < required else "above"
    ours, baseline = np.median(pairs, axis=0)
    return Row(
        what,
        as_time(float(ours)),
        as_time(float(baseline)),
        f"{middle:+.2%} ({low:+.2%} to {high:+.2%}): {verdict} {required:.0%}",
    )


def median_with_interval(values: Seconds) -> tuple[float, float, float]:
    """Return the median and its 95 % interval by the sign test, whose ends are order statistics."""
    from scipy.stats import binom

    ordered = np.sort(values)
    rank = int(binom.ppf(0.025, len(ordered), 0.5))
    lowest = max(rank - 1, 0)
    return float(np.median(ordered)), float(ordered[lowest]), float(ordered[len(ordered) - 1 - lowest])


def _share_of_saving(folder: Path, iterations: list[int]) -> Row:
    """Return the row of saving in a whole Series of the demo's smallest model, with its branch points."""
    with spent_in((SeriesTrainer, "_save")) as spent:
        wall = clocked(
            lambda: train(Root(folder / f"share-{len(iterations)}"), _demo(folder, _smallest(), iterations))
        )
    saving = sum(spent["_save"])
    lengths = ", ".join(map(str, iterations))
    return Row(
        f"saving: {len(spent['_save'])} checkpoints in runs of {lengths}",
        as_time(saving),
        as_time(wall),
        f"{saving / wall:.2%} of the whole",
    )


def _speed_of_saving(folder: Path, rounds: int) -> Row:
    """Return the row of one checkpoint of a larger model against one of its steps."""
    root, found = Root(folder / "larger"), {"bytes": 0, "parameters": 0}
    saves, steps = [], []

    def measure(trainer: SeriesTrainer, journal: Journal) -> None:
        _walk(trainer, 1, journal)
        for _ in range(rounds):
            steps.append(clocked(lambda: _walk(trainer, 1, journal)))
            saves.append(clocked(trainer._save))
        files = [path for path in (series_folder(root) / "checkpoints").rglob("*") if path.is_file()]
        found["bytes"] = sum(path.stat().st_size for path in files)
        found["parameters"] = sum(weight.numel() for weight in trainer.engine.deepspeed.parameters())

    _train(root, _demo(folder, LARGER, [10_000_000]), measure)
    save, step = float(np.median(saves)), float(np.median(steps))
    return Row(
        f"saving: {found['parameters'] / 1e6:.1f} M parameters, {found['bytes'] / 1e6:.0f} MB, against one step",
        as_time(save),
        as_time(step),
        f"{found['bytes'] / save / 1e6:.0f} MB/s; 2 % when saved every {save / step / 0.02:.0f} steps",
    )


# -- the loop, driven from outside


def _train(root: Root, fields: Fields, measure: Callable[[SeriesTrainer, Journal], None]) -> None:
    """Have the worker prepare a Series as usual, and `measure` train it."""

    def instead(trainer: SeriesTrainer, journal: Journal) -> Outcome:
        measure(trainer, journal)
        return Outcome.PREEMPTED

    with patch.object(SeriesTrainer, "train", instead):
        assert train(root, fields, checkpoint_every=10_000_000) == ["preempted"]


def _walk(trainer: SeriesTrainer, steps: int, journal: Journal | None) -> None:
    """Train on along the trunk, with its record or without, as ranks other than the first do."""
    run = trainer.runs[-1]
    rate = partial(trunk_learning_rate, run.schedule, run.optimiser.lr)
    trainer.journal = journal
    assert trainer._walk(trainer.step + steps, rate, run) is Outcome.DONE


def _steps_of(seconds: float, trainer: SeriesTrainer) -> int:
    """Return the number of steps that take about so long, a multiple of the steps between two log lines."""
    every = trainer.launch.log_every
    each = min(clocked(lambda: _walk(trainer, every, None)) for _ in range(5))
    return every * max(1, round(seconds / each))


# -- the mirror's process


@contextmanager
def _mirroring(root: Root, fields: Fields) -> Iterator[psutil.Process]:
    """Run a process that mirrors the study into SQLite as a submission does; yields it after its first round."""
    study = root.path / "study.json"
    study.write_text(json.dumps(fields), encoding="utf-8")
    with subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.overhead", str(study)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"mirrored\n"
        try:
            yield psutil.Process(process.pid)
        finally:
            process.kill()


def follow(study: Path) -> None:
    """Mirror a study for ever; prints a line after the first round."""
    root = Root(study.parent)
    fields = json.loads(study.read_text(encoding="utf-8"))
    points = resolve(validate(Study, fields, "benchmark"), root, "benchmark").points
    reader = StatusReader(root, fields["name"])
    mirror = MirrorThread(default_uri(root), fields["name"], root)
    mirror.show(reader.read(points))
    mirror.start()
    while not (root.path / "mlflow.db").exists():
        time.sleep(0.1)
    os.write(1, b"mirrored\n")
    while True:
        mirror.show(reader.read(points))
        time.sleep(SHOW_SECONDS)


if __name__ == "__main__":
    follow(Path(sys.argv[1]))
