"""Memory that really runs out: a worker with a limited address space continues with smaller micro-batches."""

from __future__ import annotations

import errno
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
from harness.train.ranks import Ranks
from harness.train.shortage import had_device_alone
from harness.train.stopping import GPU_SHARE, is_out_of_memory
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


def host_allocation() -> Exception:
    """Return the error of an allocation that no machine could serve."""
    import torch

    with pytest.raises(RuntimeError) as said:
        torch.empty(2**62, dtype=torch.uint8)
    return said.value


def caused_by(error: Exception) -> Exception:
    """Return an error that names another one as its cause, as torch.compile raises them."""
    wrapped = RuntimeError("backend='inductor' raised")
    wrapped.__cause__ = error
    return wrapped


def shortages() -> list[Exception]:
    """Return errors of the types and with the texts of torch 2.11, NCCL 2.28 and Triton 3.6."""
    import torch
    from torch.distributed import DistBackendError

    nccl = (
        "NCCL error in: /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:3690, unhandled cuda error (run with "
        "NCCL_DEBUG=INFO for details), NCCL version 2.28.9\nncclUnhandledCudaError: Call to CUDA function failed.\n"
        "Last error:\n{}"
    )
    later = "\nCUDA kernel errors might be asynchronously reported at some other API call"
    return [
        torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.2 GiB"
        ),
        torch.AcceleratorError(f"CUDA error: out of memory{later}"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        DistBackendError(nccl.format("Cuda failure 2 'out of memory'")),
        DistBackendError(nccl.format("Failed to CUDA calloc async 10485760 bytes")),
        RuntimeError(
            'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "/pytorch/c10/cuda/CUDACachingAllocator.cpp":1131'
        ),
        caused_by(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")),
        host_allocation(),
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("std::bad_alloc"),
    ]


def test_every_word_for_a_lack_of_memory_halves_the_micro_batch(
    study_fields: Fields, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from harness.train.engine import Engine

    count, step = len(shortages()), Engine.step
    halves = 5
    batch, sizes = 2**halves, []

    def lacking(engine: Engine, *arguments: Any) -> None:
        sizes.append(engine.layout.micro_batch)
        if engine.layout.micro_batch > 1 and left:
            raise left.pop(0)
        step(engine, *arguments)

    monkeypatch.setattr(Engine, "step", lacking)
    study_fields["grid"]["iterations"] = [2]
    study_fields["training"] |= {
        "batch": batch,
        "schedule": {"warmup": 0, "decay_fraction": 0.5},
        "eval_clips": 1,
    }
    for first in range(0, count, halves):
        # An error that something kept would hold the engine in its traceback.
        left, root = shortages()[first : first + halves], Root(tmp_path / str(first))
        expected = [batch >> place for place in range(len(left) + 1)]
        sizes.clear()
        assert train(root, study_fields) == ["finished"]
        assert sizes[: len(expected)] == expected
        assert set(sizes[len(expected) :]) == {expected[-1]}


@pytest.mark.parametrize(
    "text",
    [
        "shapes do not match",
        "out of resource: shared memory, Required: 294912, Hardware limit: 232448. Reducing block sizes may help.",
        "NCCL error: remote process exited or there was a network error",
        "Call to ibv_reg_mr failed with error Cannot allocate memory",
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasLtMatmul`",
    ],
)
def test_other_errors_halve_nothing(text: str) -> None:
    assert not is_out_of_memory(RuntimeError(text))


@pytest.mark.parametrize(
    ("share", "free", "reserved", "alone"),
    [
        (None, 1.0, 77.0, True),  # all of it was this rank's, but for the context
        (None, 1.0, 40.0, False),  # another process has 39 GiB
        ("0.25", 60.0, 20.0, False),
    ],
)
def test_a_gpu_is_shared_where_a_task_has_a_part_of_it_or_others_took_memory(
    monkeypatch: pytest.MonkeyPatch, share: str | None, free: float, reserved: float, alone: bool
) -> None:
    import torch

    monkeypatch.delenv(GPU_SHARE, raising=False)
    if share:
        monkeypatch.setenv(GPU_SHARE, share)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free * 2**30, 80.0 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: reserved * 2**30)
    assert had_device_alone(Ranks(0, 1, "cuda:0")) is alone
