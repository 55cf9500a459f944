"""Every ZeRO stage and number of ranks computes the same losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from harness.record import checkpoints
from harness.record.journal import Event, read_progress
from harness.record.kinds import Kind
from harness.record.root import Root
from tests.harness.faults import train_on_two_ranks, work
from tests.harness.trainer import prepared, spoiling, train
from tests.studies import Fields, tiny_study

STEPS, SHORT = 10, 5
STAGES = (1, 2, 3)
SPOILED, BEFORE = 6, 3
"""Step at which a moment of the second rank is spoiled, and the last checkpoint before it."""


@dataclass(frozen=True)
class Trained:
    """One study of one Run, trained in several ways."""

    fields: Fields
    alone: Root
    """Trained by one rank without ZeRO."""
    one_rank: Sequence[float]
    """Its training losses."""
    whole: dict[int, Root]
    """Trained by two ranks to the end, by ZeRO stage."""
    begun: dict[int, Root]
    """Trained by two ranks for a few steps, by ZeRO stage."""
    spoiled: dict[int, Root]
    """Trained by two ranks until a value of the second was not finite, by ZeRO stage."""


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
    spoiled = {stage: Root(folder / f"spoiled-{stage}") for stage in (0, *STAGES)}
    spoiled_dirs = []
    for stage, root in spoiled.items():
        ((_, (run,)),) = prepared(
            root, fields_of(tiny_corpus, STEPS), log_every=100, zero_stage=stage, checkpoint_every=BEFORE
        )
        spoiled_dirs.append(root.run(run.run_id))
    train_on_two_ranks(run_dirs, folder / "meeting")
    train_on_two_ranks(spoiled_dirs, folder / "spoiled-meeting", work_spoiled, status=1)
    alone, fields = Root(folder / "alone"), fields_of(tiny_corpus, STEPS)
    train(alone, fields, log_every=1)
    return Trained(fields, alone, training_losses(alone, fields), whole, begun, spoiled)


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
        "compiled": False,
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


@pytest.mark.parametrize("stage", STAGES)
def test_the_gradient_norm_is_that_of_the_global_batch_with_and_without_zero(
    trained: Trained, stage: int
) -> None:
    (alone,) = (trained.alone.path / "series").iterdir()
    (folder,) = (trained.whole[stage].path / "series").iterdir()
    expected, norms = (
        {n: e["grad_norm"] for n, e in read_progress(f).steps.items()} for f in (alone, folder)
    )
    assert len(expected) == 8
    assert norms == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("stage", [0, *STAGES])
def test_ranks_agree_to_save_nothing_if_a_value_of_one_is_not_finite(trained: Trained, stage: int) -> None:
    root = trained.spoiled[stage]
    for folder in (*root.path.glob("series/*"), *root.path.glob("runs/*")):
        progress = read_progress(folder)
        assert (progress.state, progress.kind) == (Event.FAILED, Kind.DIVERGED)
        assert f"not finite after {SPOILED} steps; `ssmscale retry` goes on from step {BEFORE}" in str(
            progress.result
        )
    (series,) = root.path.glob("series/*")
    assert [held.marker.step for held in checkpoints.marked(series / "checkpoints")] == [BEFORE]


def work_spoiled(run_dirs: Sequence[str], environment: dict[str, str]) -> None:
    """Train as a worker does; memory of the second rank fails at a step of each Series."""
    from harness.train.engine import Engine

    build, taken = Engine.__init__, Engine.step

    def build_and_spoil(engine: Engine, *arguments: Any) -> None:
        build(engine, *arguments)
        Engine.step = spoiling(SPOILED, -1, taken) if environment["RANK"] == "1" else taken

    Engine.__init__ = build_and_spoil
    work(run_dirs, environment)
