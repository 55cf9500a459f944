"""Batches made ahead by a thread are those that the loop would make itself, in the same order."""

from __future__ import annotations

import threading
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from harness.record.root import Root
from harness.train import ahead
from harness.train.ahead import Ahead
from harness.train.batches import MicroBatch, StepBatch
from harness.train.engine import Engine
from ssmttm.errors import InputError
from ssmttm.text.text_batch import TextBatch
from tests.harness.trainer import StopAfter, losses, train, trunk_steps, undisturbed
from tests.studies import Fields, tiny_study, with_iterations
from tests.waiting import wait_until


@pytest.fixture
def in_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make batches ahead here too, as beside a GPU."""
    monkeypatch.setattr(ahead, "computes_apart", lambda _: True)


@pytest.fixture
def fields(tiny_corpus: Path) -> Fields:
    fields = with_iterations(tiny_study(tiny_corpus), 8, 14)
    fields["training"]["regularisation"] = {"caption_dropout": 0.3, "position_dropout": 0.3}
    return fields


@pytest.mark.parametrize("encoder", ["bytes", "frozen"])
def test_a_batch_travels_in_one_block_without_a_change(in_thread: None, encoder: str) -> None:
    def micro_batch(seed: int, size: int, width: int) -> MicroBatch:
        draw = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, 99, (size, 3, 7), generator=draw)
        values = ids[:, 0] if encoder == "bytes" else torch.randn(size, width, 5, generator=draw).half()
        flags = torch.rand(size, width, generator=draw) < 0.5
        return MicroBatch(ids, ids.transpose(0, 1).contiguous(), TextBatch(values, flags, flags[:, 0]))

    made = StepBatch([micro_batch(1, 4, 6), micro_batch(2, 4, 3), micro_batch(3, 1, 1)], 84)
    with Ahead(lambda _: made, "cpu") as batches:
        taken = batches.take(0, 1)
    assert taken.n_targets == made.n_targets
    pairs = [
        pair
        for one, other in zip(taken.micro_batches, made.micro_batches, strict=True)
        for pair in zip(one.tensors(), other.tensors(), strict=True)
    ]
    assert all(one.dtype == other.dtype and torch.equal(one, other) for one, other in pairs)
    assert len({one.untyped_storage().data_ptr() for one, _ in pairs}) == 1


def test_losses_are_equal_to_the_bit_whoever_makes_the_batches(
    in_thread: None, fields: Fields, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as alone:
        alone.setattr(ahead, "computes_apart", lambda _: False)
        expected = undisturbed(fields, log_every=1, eval_every=3)
    root = Root(tmp_path)
    settings = {"log_every": 1, "eval_every": 3, "checkpoint_every": 2}
    assert train(root, fields, StopAfter(5), **settings) == ["preempted"]
    assert trunk_steps(root)[-1] == 5
    assert train(root, fields, **settings) == ["finished"]
    assert losses(root, fields) == expected


def test_the_next_batch_is_made_while_a_step_is_taken(in_thread: None) -> None:
    made: list[tuple[int, str]] = []

    def make(step: int) -> StepBatch:
        made.append((step, threading.current_thread().name))
        return StepBatch([], step)

    with Ahead(make, "cpu") as batches:
        # The walk to step 5 ends there; the loop then goes to step 9, and on to 20 before 10 is taken.
        for step, end, known in (
            (3, 5, [3, 4]),
            (4, 5, [3, 4]),
            (9, 12, [3, 4, 9, 10]),
            (20, 21, [3, 4, 9, 10, 20]),
        ):
            assert batches.take(step, end).n_targets == step
            wait_until(lambda known=known: [number for number, _ in made] == known)
        assert all(name.startswith("batches") for _, name in made)
    assert not any(thread.name.startswith("batches") for thread in threading.enumerate())


def test_what_a_batch_lacks_is_raised_at_its_own_step(in_thread: None) -> None:
    def make(step: int) -> StepBatch:
        if step == 1:
            raise InputError("shard-1.npy: damaged")
        return StepBatch([], 0)

    with Ahead(make, "cpu") as batches:
        batches.take(0, 3)
        with pytest.raises(InputError, match="damaged"):
            batches.take(1, 3)
        batches.take(2, 3)


ADAMW = "torch/optim/adam.py"
"""It keeps its counters on the host."""


class Waits(TorchDispatchMode):
    """Records where a GPU would be waited for: values read from tensors, and tensors made of numbers of the host."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, _types: Any, arguments: Any = (), named: Any = None) -> Any:
        if function.overloadpacket in {torch.ops.aten._local_scalar_dense, torch.ops.aten.lift_fresh}:
            files = {frame.f_code.co_filename for frame, _ in traceback.walk_stack(None)}
            if not any(file.endswith(ADAMW) for file in files):
                self.seen.append("".join(traceback.format_stack(limit=12)[:-1]))
        return function(*arguments, **(named or {}))


def test_no_step_between_two_logged_ones_waits_for_a_gpu(
    in_thread: None, fields: Fields, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, step = [], Engine.step

    def watched(engine: Engine, *arguments: Any) -> None:
        with Waits() as waits:
            step(engine, *arguments)
        taken.append(waits.seen)

    monkeypatch.setattr(Engine, "step", watched)
    assert train(Root(tmp_path), fields) == ["finished"]
    assert len(taken) > 10
    waited = [where for step in taken for where in step]
    assert not waited, waited[0]
