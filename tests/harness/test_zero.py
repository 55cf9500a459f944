"""ZeRO stages and ranks: other ways of doing the same arithmetic."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harness.journal import read_progress
from harness.rundir import Root
from tests.conftest import REPOSITORY
from tests.harness.trainer import prepared, train
from tests.waiting import PATIENCE

STEPS = 20


def training_losses(root: Root, fields: dict[str, Any]) -> list[float]:
    """The training loss at each of the first 20 steps, trunk and branch together."""
    ((_, (run,)),) = prepared(root, fields, log_every=1)
    steps = {**read_progress(root.series(run.series_id)).steps, **read_progress(root.run(run.run_id)).steps}
    return [steps[step]["loss"] for step in range(1, STEPS + 1)]


@pytest.fixture
def fields(study_fields: dict[str, Any]) -> dict[str, Any]:
    study_fields["grid"] |= {"sizes": {"s": {"n_blocks": 2, "d_model": 32}}, "iterations": [STEPS]}
    return study_fields


@pytest.fixture
def one_rank(tmp_path: Path, fields: dict[str, Any]) -> list[float]:
    root = Root(tmp_path / "one")
    train(root, fields, log_every=1)
    return training_losses(root, fields)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_ranks_under_zero_give_the_losses_of_one(
    tmp_path: Path, fields: dict[str, Any], one_rank: list[float], stage: int
) -> None:
    root = Root(tmp_path / "two")
    ((_, (run,)),) = prepared(root, fields, log_every=1, zero_stage=stage, micro_batch=2)
    train_on_ranks(2, root.run(run.run_id))
    started = read_progress(root.run(run.run_id)).started
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
    assert training_losses(root, fields) == pytest.approx(one_rank, abs=1e-4)


@pytest.mark.parametrize(
    "stage", [pytest.param(1, marks=pytest.mark.verify), pytest.param(2, marks=pytest.mark.verify), 3]
)
def test_what_two_ranks_saved_one_rank_goes_on_with(
    tmp_path: Path, fields: dict[str, Any], one_rank: list[float], stage: int
) -> None:
    root = Root(tmp_path / "two")
    fields["grid"]["iterations"] = [5]
    ((_, (short,)),) = prepared(root, fields, log_every=1, zero_stage=stage)
    train_on_ranks(2, root.run(short.run_id))  # leaves the trunk at step 4
    fields["grid"]["iterations"] = [STEPS]
    train(root, fields, log_every=1, zero_stage=stage)
    assert training_losses(root, fields) == pytest.approx(one_rank, abs=1e-5)


def train_on_ranks(ranks: int, run_dir: Path) -> None:
    done = subprocess.run(
        [
            *(
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--nproc_per_node",
                str(ranks),
                "--rdzv-backend",
                "c10d",
            ),
            *("--rdzv-endpoint", "127.0.0.1:0", "-m", "harness.worker", str(run_dir)),
        ],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
