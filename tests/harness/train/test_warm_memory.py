"""A warm worker trains one Series after another without holding what the earlier ones took."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from harness.dispatch import local, worker_process
from harness.dispatch.worker_process import RankProcess, environment_of_rank
from harness.record.jobs import JobState
from harness.record.root import Root
from harness.train.engine import Engine, engines_held, free_memory
from tests.harness.trainer import prepared, train
from tests.studies import Fields, tiny_study
from tests.waiting import PATIENCE, wait_until

SERIES = 10
MIB = 2**20


@pytest.fixture
def fields(tiny_corpus: Path) -> Fields:
    fields = tiny_study(tiny_corpus)
    fields["grid"]["iterations"] = [3]
    fields["training"] |= {"batch": 2, "schedule": {"warmup": 0, "decay_fraction": 0.5}, "eval_clips": 1}
    return fields


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[RankProcess]:
    worker = RankProcess(environment_of_rank(0, 1, 1), tmp_path / "log")
    try:
        yield worker
    finally:
        worker.ask_to_stop()
        worker.end(10.0)


def outcome_of(worker: RankProcess, run_dir: Path) -> str:
    """Have a worker train a Series; return the outcome."""
    worker.feed([str(run_dir)])
    deadline = time.monotonic() + PATIENCE
    while not worker.replies:
        assert worker.status is None
        assert time.monotonic() < deadline
        worker.wait_for_reply(1.0)
    return worker.replies.pop()


@pytest.mark.verify
def test_memory_grows_by_less_than_3_percent_over_ten_series(
    fields: Fields, tmp_path: Path, worker: RankProcess
) -> None:
    # Of 4 M parameters, which take 64 MB with their moments and gradients.
    size = {"s": {"n_blocks": 4, "d_model": 256}}
    fields["grid"] |= {"sizes": size, "seeds": list(range(SERIES))}
    process = psutil.Process(worker._process.pid)
    for stage in (0, 1, 2):
        root, held = Root(tmp_path / f"zero-{stage}"), []
        for _, (run,) in prepared(root, fields, zero_stage=stage):
            assert outcome_of(worker, root.run(run.run_id)) == "finished"
            held.append(process.memory_info().rss / MIB)
        assert held[-1] < 1.03 * held[0], (stage, held)
        assert not worker.is_spent


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_no_engine_is_held_after_its_series(fields: Fields, tmp_path: Path, stage: int) -> None:
    free_memory()
    before = engines_held()  # other tests leave some
    assert train(Root(tmp_path), fields, zero_stage=stage) == ["finished"]
    assert engines_held() == before


def test_no_engine_is_held_whose_memory_ran_out_in_the_middle_of_a_step(
    fields: Fields, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free_memory()
    before, held = engines_held(), []
    build, step = Engine.__init__, Engine.step

    def building(engine: Engine, *arguments: Any) -> None:
        held.append(engines_held() - before)
        build(engine, *arguments)

    def lacking(*_: object) -> None:
        raise MemoryError

    def stepping(engine: Engine, losses: Any, rate: float) -> None:
        step(engine, [*losses[:-1], lacking] if engine.layout.micro_batch == 2 else losses, rate)

    monkeypatch.setattr(Engine, "__init__", building)
    monkeypatch.setattr(Engine, "step", stepping)
    fields["training"]["batch"] = 4
    assert train(Root(tmp_path), fields, zero_stage=2, micro_batch=2) == ["finished"]
    assert held == [0, 0]


def test_a_group_whose_engines_stay_ends_and_another_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = """
import json, sys
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    print(json.dumps({"outcome": "finished", "is_spent": "spent" in line}), flush=True)
"""
    monkeypatch.setattr(worker_process, "PLAIN", [sys.executable, "-c", program])
    group = local._Group(2, 1, [0, 1], tmp_path, "")
    handle: Any = SimpleNamespace(task=SimpleNamespace(folder=tmp_path, stall_seconds=60.0, order="plain"))
    try:
        for order, goes in (("plain", False), ("spent", True)):
            handle.task.order = order
            group.feed(handle)
            ended: list[Any] = []
            wait_until(lambda ended=ended: ended.append(group.poll()) or ended[-1])
            assert ended[-1] == (handle, JobState.ENDED)
            assert group.is_gone is goes
    finally:
        group.stop()
        group.end()
    assert all(process.status is not None for process in group._processes)


@pytest.mark.verify
def test_a_worker_says_that_engines_of_zero_3_stay(
    fields: Fields, tmp_path: Path, worker: RankProcess
) -> None:
    ((_, (run,)),) = prepared(Root(tmp_path), fields, zero_stage=3)
    assert outcome_of(worker, Root(tmp_path).run(run.run_id)) == "finished"
    assert worker.is_spent
