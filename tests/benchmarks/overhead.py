"""What keeping a record costs: journal and mirroring against the same loop without, and saving checkpoints.

The same engine trains on in blocks, by turns with and without; blocks are compared with their neighbours, so that
whatever else the machine does falls on both. The mirror is a process of its own, as where `ssmscale submit` trains,
and is held still while a block without it is timed.
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
import yaml

from harness.common.validation import validate
from harness.record.control import Control
from harness.record.journal import Journal
from harness.record.registry import resolve
from harness.record.root import Root
from harness.record.status import StatusReader
from harness.study.run import trunk_learning_rate
from harness.study.schema import Study
from harness.tracking.live import MirrorThread
from harness.tracking.store import default_uri
from harness.train.loop import Outcome, SeriesTrainer
from tests.benchmarks.measure import Row, Seconds, as_time, clocked
from tests.corpora import write_tiny_corpus
from tests.harness.trainer import series_folder, train
from tests.studies import Fields

DEMO = Path(__file__).parents[2] / "sweeps" / "demo.yaml"
BLOCK_SECONDS = 1.6
"""A round of mirroring falls due every 3 s, so that every block with a mirror has one: twice its share."""
SHOW_SECONDS = 1.0
"""How often a submission reads the journals for what it shows."""
REQUIRED = 0.01
LARGER = {"n_blocks": 6, "d_model": 672, "d_state": 64, "ssm_head_dim": 64, "head_dim": 84}
"""About 30 M parameters."""


def run(*, quick: bool) -> Iterator[Row]:
    """Overhead on a step, what of it is spent in the loop itself, and what saving costs."""
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
            "record: of it journal, fence and cancellations, a step",
            as_time(taken.inside),
            as_time(step),
            f"{taken.inside / step:.2%} of a step",
        )
        yield _share_of_saving(folder, [100, 200] if quick else [100, 200, 400, 800])
        yield _speed_of_saving(folder, rounds=2 if quick else 5)


@dataclass
class Blocks:
    """Seconds a step of each pair of blocks, with the record and without, and those spent in its own functions."""

    wall: list[tuple[float, float]] = field(default_factory=list)
    processor: list[tuple[float, float]] = field(default_factory=list)
    """Of the training process, the kernel's work for it included: what others do on the machine hardly shows."""
    inside: float = math.nan


def _demo(folder: Path, size: dict[str, Any], iterations: list[int]) -> dict[str, Any]:
    """The demo's study with one prefix_simba of one size, on a corpus of the same shape."""
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
            with _spent_in(time.thread_time, (Journal, "append"), (SeriesTrainer, "_agree")) as spent:
                _walk(trainer, steps, journal)
            taken.inside = sum(spent) / steps

    _train(root, fields, measure)
    return taken


def _overhead(what: str, pairs: Seconds) -> Row:
    """The median of the pairs' relative differences, with a 95 % interval from their ranks; pairs (count, 2)."""
    middle, low, high = median_with_interval(pairs[:, 0] / pairs[:, 1] - 1)
    verdict = "below" if high < REQUIRED else "not told apart from" if low < REQUIRED else "above"
    ours, baseline = np.median(pairs, axis=0)
    return Row(
        what,
        as_time(float(ours)),
        as_time(float(baseline)),
        f"{middle:+.2%} ({low:+.2%} to {high:+.2%}): {verdict} {REQUIRED:.0%}",
    )


def median_with_interval(values: Seconds) -> tuple[float, float, float]:
    """Median and the order statistics between which the true one lies 19 times in 20 (the sign test's interval)."""
    from scipy.stats import binom

    ordered = np.sort(values)
    rank = int(binom.ppf(0.025, len(ordered), 0.5))
    lowest = max(rank - 1, 0)
    return float(np.median(ordered)), float(ordered[lowest]), float(ordered[len(ordered) - 1 - lowest])


def _share_of_saving(folder: Path, iterations: list[int]) -> Row:
    """Saving in the whole Series of the demo's smallest model, branch points and all."""
    with _spent_in(time.perf_counter, (SeriesTrainer, "_save")) as spent:
        wall = clocked(
            lambda: train(Root(folder / f"share-{len(iterations)}"), _demo(folder, _smallest(), iterations))
        )
    saving = sum(spent)
    lengths = ", ".join(map(str, iterations))
    return Row(
        f"saving: {len(spent)} checkpoints in runs of {lengths}",
        as_time(saving),
        as_time(wall),
        f"{saving / wall:.2%} of the whole",
    )


def _speed_of_saving(folder: Path, rounds: int) -> Row:
    """One checkpoint of a larger model against one of its steps; the ratio says after how many steps saving is 2 %."""
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
    """Have the worker prepare a Series as ever, and `measure` train it."""

    def instead(trainer: SeriesTrainer, journal: Journal) -> Outcome:
        measure(trainer, journal)
        return Outcome.PREEMPTED

    with patch.object(SeriesTrainer, "train", instead):
        assert train(root, fields, checkpoint_every=10_000_000) == ["preempted"]


def _walk(trainer: SeriesTrainer, steps: int, journal: Journal | None) -> None:
    """Train on along the trunk, with its record or, as ranks other than the first, without."""
    run = trainer.runs[-1]
    rate = partial(trunk_learning_rate, run.schedule, run.optimiser.lr)
    trainer.journal = journal
    assert trainer._walk(trainer.step + steps, rate, run) is Outcome.DONE


def _steps_of(seconds: float, trainer: SeriesTrainer) -> int:
    """A number of steps that takes about so long, in whole intervals between two log lines."""
    every = trainer.launch.log_every
    each = min(clocked(lambda: _walk(trainer, every, None)) for _ in range(5))
    return every * max(1, round(seconds / each))


@contextmanager
def _spent_in(clock: Callable[[], float], *watched: tuple[type, str]) -> Iterator[list[float]]:
    """Seconds by `clock` of each outermost call of the functions."""
    spent: list[float] = []
    depth = [0]

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            depth[0] += 1
            start = clock()
            try:
                return function(*arguments, **named)
            finally:
                depth[0] -= 1
                if not depth[0]:
                    spent.append(clock() - start)

        return call

    patches = [patch.object(owner, name, timed(getattr(owner, name))) for owner, name in watched]
    for one in patches:
        one.start()
    try:
        yield spent
    finally:
        for one in patches:
            one.stop()


# -- the mirror's process


@contextmanager
def _mirroring(root: Root, fields: Fields) -> Iterator[psutil.Process]:
    """A process that follows the study into SQLite as a submission does; ready when it begins to."""
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
    """Mirror a study for ever; says when its first round is done."""
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
