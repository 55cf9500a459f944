"""Every ZeRO stage and number of ranks computes the same losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness.record.journal import read_progress
from harness.record.root import Root
from harness.train.meeting import make_meeting
from tests.harness.faults import start_worker
from tests.harness.trainer import prepared, train
from tests.studies import Fields, tiny_study
from tests.waiting import PATIENCE

STEPS, SHORT = 10, 5
STAGES = (1, 2, 3)


@dataclass(frozen=True)
class Trained:
    """One study of one Run, trained in several ways."""

    fields: Fields
    one_rank: Sequence[float]
    """Training losses of one rank."""
    whole: dict[int, Root]
    """Trained by two ranks to the end, by ZeRO stage."""
    begun: dict[int, Root]
    """Trained by two ranks for a few steps, by ZeRO stage."""


def fields_of(corpus: Path, iterations: int) -> Fields:
    fields = tiny_study(corpus)
    fields["grid"] |= {"sizes": {"s": {"n_blocks": 2, "d_model": 32}}, "iterations": [iterations]}
    return fields


def training_losses(root: Root, fields: Fields) -> list[float]:
    """Return the training loss of every step, trunk and branch together."""
    ((_, (run,)),) = prepared(root, fields, log_every=1)
    steps = {**read_progress(root.series(run.series_id)).steps, **read_progress(root.run(run.run_id)).steps}
    return [steps[step]["loss"] for step in range(1, STEPS + 1)]


@pytest.fixture(scope="module")
def trained(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """All training of two ranks, by the same two processes: starting them takes longest."""
    folder = tmp_path_factory.mktemp("zero")
    whole = {stage: Root(folder / f"whole-{stage}") for stage in STAGES}
    begun = {stage: Root(folder / f"begun-{stage}") for stage in STAGES}
    run_dirs = []
    for roots, iterations, launch in ((whole, STEPS, {"micro_batch": 2}), (begun, SHORT, {})):
        for stage, root in roots.items():
            fields = fields_of(tiny_corpus, iterations)
            ((_, (run,)),) = prepared(root, fields, log_every=1, zero_stage=stage, **launch)
            run_dirs.append(root.run(run.run_id))
    train_on_two_ranks(run_dirs, folder)
    alone, fields = Root(folder / "alone"), fields_of(tiny_corpus, STEPS)
    train(alone, fields, log_every=1)
    return Trained(fields, training_losses(alone, fields), whole, begun)


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_under_zero_give_the_losses_of_one(trained: Trained, stage: int) -> None:
    root = trained.whole[stage]
    (folder,) = (root.path / "runs").iterdir()
    started = read_progress(folder).started
    assert started is not None
    assert started["layout"] == {
        "ranks": 2,
        "micro_batch": 2,
        "accumulation": 2,
        "zero_stage": stage,
        "threads": 1,
        "kernels": "torch",
        "activation_checkpointing": False,
    }
    assert training_losses(root, trained.fields) == pytest.approx(trained.one_rank, abs=1e-4)


@pytest.mark.parametrize(
    "stage", [pytest.param(1, marks=pytest.mark.verify), pytest.param(2, marks=pytest.mark.verify), 3]
)
def test_one_rank_resumes_the_checkpoint_of_two(trained: Trained, stage: int) -> None:
    root = trained.begun[stage]
    train(root, trained.fields, log_every=1, zero_stage=stage)  # from step 4 of the trunk
    assert training_losses(root, trained.fields) == pytest.approx(trained.one_rank, abs=1e-5)


def train_on_two_ranks(run_dirs: Sequence[Path], folder: Path) -> None:
    make_meeting(folder / "meeting")
    together = {"WORLD_SIZE": "2", "SSMSCALE_MEETING": str(folder / "meeting")}
    ranks = [start_worker(run_dirs, RANK=rank, LOCAL_RANK=rank, **together) for rank in ("0", "1")]
    for rank in ranks:
        rank.join(PATIENCE)
    assert [rank.exitcode for rank in ranks] == [0, 0]
