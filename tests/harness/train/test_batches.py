"""A step's batch is a function of (seed, step): layout, order of steps and interruptions change no sample."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from harness.common.validation import validate
from harness.plan.cluster import choose_layout
from harness.record.registry import resolve
from harness.record.root import Launch, Root
from harness.study.schema import Study
from harness.train.batches import Batches, seed_dropout
from tests.studies import Fields, tiny_study

BATCH, POSITIONS = 16, 16
STEPS = (0, 1, 7, 1000)
Sample = tuple[bytes, ...]


@pytest.fixture(scope="module")
def fields(tiny_corpus: Path) -> Fields:
    fields = tiny_study(tiny_corpus)
    fields["text"]["max_positions"] = POSITIONS
    fields["corpus"]["frames"] = 40  # less than a clip, so that crops are drawn too
    fields["training"] |= {
        "batch": BATCH,
        "regularisation": {"caption_dropout": 0.3, "position_dropout": 0.3},
    }
    return fields


def batches(fields: Fields, tmp_path: Path, ranks: int, micro_batch: int, rank: int) -> Batches:
    """Return the batches of one rank."""
    study = validate(Study, fields, "test")
    root = Root(tmp_path)
    run = resolve(study, root, "test").points[0].run
    launch = Launch(
        corpus=study.corpus.path,
        control=tmp_path / "control.jsonl",
        dispatcher="test",
        micro_batch=micro_batch,
    )
    return Batches(run, launch, choose_layout(BATCH, ranks, micro_batch, 0, 1), rank, "cpu", root.text)


def in_global_order(drawn: list[Batches], step: int) -> list[Sample]:
    """Return every sample of a step, all ranks together, as bytes: inputs, targets, text, masks."""
    by_rank = [source.training_step(step) for source in drawn]
    assert len({targets for _, targets in by_rank}) == 1
    samples = []
    for turn in range(len(by_rank[0][0])):  # the ranks side by side, one micro-batch after the other
        for micro_batches, _ in by_rank:
            batch = micro_batches[turn]
            missing = POSITIONS - batch.text.mask.shape[1]
            patch = batch.text.values.shape[1] // batch.text.mask.shape[1]
            mask = torch.nn.functional.pad(batch.text.mask, (missing, 0))
            text = torch.nn.functional.pad(batch.text.values, (missing * patch, 0))
            parts = (batch.inputs, batch.targets, text, mask, batch.text.dropped)
            samples += [
                tuple(part[row].numpy().tobytes() for part in parts) for row in range(len(batch.inputs))
            ]
    return samples


@pytest.fixture(scope="module")
def whole(fields: Fields, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Sample]]:
    """Samples of the steps in one micro-batch of one rank."""
    source = batches(fields, tmp_path_factory.mktemp("whole"), 1, BATCH, 0)
    return {step: in_global_order([source], step) for step in STEPS}


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("micro_batch", [1, 2, 4, 8])
def test_any_layout_deals_out_the_same_samples_in_the_same_order(
    fields: Fields, tmp_path: Path, whole: dict[int, list[Sample]], ranks: int, micro_batch: int
) -> None:
    drawn = [batches(fields, tmp_path, ranks, micro_batch, rank) for rank in range(ranks)]
    micro = min(micro_batch, BATCH // ranks)
    assert all(len(batch.inputs) == micro for source in drawn for batch in source.training_step(0)[0])
    for step in reversed(STEPS):
        assert in_global_order(drawn, step) == whole[step], step


def test_steps_and_seeds_differ(fields: Fields, tmp_path: Path, whole: dict[int, list[Sample]]) -> None:
    assert len({tuple(samples) for samples in whole.values()}) == len(STEPS)
    other = batches({**fields, "grid": {**fields["grid"], "seeds": [1]}}, tmp_path, 1, BATCH, 0)
    assert in_global_order([other], 0) != whole[0]
    samples = [sample for held in whole.values() for sample in held]
    assert len({sample[3] for sample in samples}) > 5  # each sample's positions are masked in its own way
    assert {sample[4] for sample in samples} == {b"\0", b"\1"}


def test_dropout_is_drawn_as_after_seeding_all_of_torch() -> None:
    torch.manual_seed(2**50 + 1)
    expected = torch.rand(8)
    seed_dropout(2**50 + 1, "cpu")
    assert torch.equal(torch.rand(8), expected)
