"""Memory that really runs out: a worker with a limited address space continues with smaller micro-batches."""

from __future__ import annotations

import json
import multiprocessing
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from harness.plan.resources import NAME, remember
from harness.record.journal import Event, read_progress
from harness.record.root import Layout, Root
from harness.train.stopping import is_out_of_memory
from tests.harness.conftest import PlanOf
from tests.harness.journals import read_events
from tests.harness.trainer import losses, prepared, progress_of, series_folder, train
from tests.studies import Fields
from tests.waiting import PATIENCE

MIB = 2**20


def limited(run_dirs: Sequence[str], spare: int, after: int) -> None:
    """Run a worker that may take at most `spare` more bytes of memory from its engine's step `after` on."""
    from harness.train.engine import Engine
    from harness.train.worker import main

    step, taken = Engine.step, 0

    def watched(self: Engine, *arguments: Any) -> None:
        nonlocal taken
        taken += 1
        if taken == after:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            most = pages * resource.getpagesize() + spare
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
        step(self, *arguments)

    Engine.step = watched  # type: ignore[method-assign]
    sys.exit(main(run_dirs))


def attempt(run_dirs: Sequence[Path], spare: int, after: int = 1) -> int | None:
    """Train in a new process with limited memory; return its exit status."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tests.harness.preloaded"])
    process = server.Process(target=limited, args=([str(path) for path in run_dirs], spare, after))
    process.start()
    process.join(PATIENCE)
    assert process.exitcode is not None
    return process.exitcode


@pytest.fixture
def hungry(study_fields: Fields) -> Fields:
    """A wide feed-forward layer with tensors of 120 MB at micro-batch 32, so that torch runs out of memory first."""
    study_fields["grid"] |= {
        "sizes": {"xs": {"n_blocks": 1, "d_model": 64, "ff_mult": 256}},
        "iterations": [3],
    }
    schedule = {"warmup": 0, "decay_fraction": 0.5}
    study_fields["training"] |= {"batch": 32, "schedule": schedule, "eval_clips": 1}
    return study_fields


def warnings(root: Root) -> str:
    return "\n".join(e["text"] for e in read_events(series_folder(root)) if e["event"] == "warning")


def test_a_smaller_micro_batch_goes_on_from_the_last_checkpoint_to_the_same_loss(
    hungry: Fields, tmp_path: Path
) -> None:
    root = Root(tmp_path / "runs")
    ((_, runs),) = prepared(root, hungry)
    status = attempt([root.run(run.run_id) for run in runs], spare=230 * MIB, after=2)
    log = "".join(path.read_text()[-2000:] for path in series_folder(root).glob("logs/*.log"))
    assert status == 0, log
    layout = (read_progress(series_folder(root)).started or {})["layout"]
    assert layout["micro_batch"] < 32
    assert layout["micro_batch"] * layout["accumulation"] == 32
    assert "out of memory with micro-batch 32" in warnings(root)
    assert "agree to rounding, not to the bit" in warnings(root)
    kept = [json.loads(line) for line in (root.study("tiny") / NAME).read_text().splitlines()]
    assert kept[0]["micro_batch"] == 32
    assert "resumed from" in log
    apart = Root(tmp_path / "apart")
    train(apart, hungry)
    assert losses(root, hungry) == pytest.approx(losses(apart, hungry), rel=1e-3)


def test_a_run_whose_micro_batch_of_1_does_not_fit_fails_with_a_remedy(
    hungry: Fields, tmp_path: Path
) -> None:
    root = Root(tmp_path / "runs")
    ((_, runs),) = prepared(root, hungry)
    assert attempt([root.run(run.run_id) for run in runs], spare=24 * MIB) == 1
    (failed,) = progress_of(root, hungry)
    assert failed.state == Event.FAILED
    assert failed.result is not None
    assert "no memory for a micro-batch of 1" in failed.result["reason"]
    assert "what takes less: resources: {ranks: " in failed.result["reason"]


def test_later_series_of_that_shape_and_the_plan_begin_with_a_size_that_fits(
    study_fields: Fields, tmp_path: Path, plan_of: PlanOf
) -> None:
    root = Root(tmp_path / "runs")
    ((_, runs),) = prepared(root, study_fields)
    remember(root.study("tiny"), runs[0], Layout(micro_batch=8, zero_stage=0), "cpu", None)
    study_fields["grid"] |= {"seeds": [5], "iterations": [4]}
    (row,) = plan_of(study_fields)["runs"]
    assert (row["micro_batch"], row["accumulation"]) == (4, 2)
    assert "ran out of memory" in row["why"]["micro_batch"]
    train(root, study_fields)
    (done,) = progress_of(root, study_fields)
    assert (done.started or {})["layout"]["micro_batch"] == 4


def test_out_of_memory_errors_of_torch_are_recognised_and_no_others() -> None:
    import torch

    with pytest.raises(RuntimeError) as said:
        torch.empty(2**62, dtype=torch.uint8)
    assert is_out_of_memory(said.value)
    assert is_out_of_memory(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
