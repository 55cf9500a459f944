"""A series that was planned for GPUs trains on GPUs, or fails with the reason in its journal."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.common.format import GIB
from harness.plan.memory import CUDA_CONTEXT, memory
from harness.record.journal import Event
from harness.record.nodes import NodeFailure
from harness.record.root import Launch, Root
from harness.study.run import Run
from harness.train import ranks as ranks_of
from harness.train.layout import series_layout
from harness.train.ranks import Ranks
from ssmttm.model.kernels import Kernels
from tests.harness.journals import read_events
from tests.harness.nvml import H100, copies, install
from tests.harness.plan.runs import made_run
from tests.harness.train.test_ranks import run_two
from tests.harness.trainer import losses, series_folder, train, undisturbed
from tests.studies import Fields, with_iterations


@pytest.fixture(autouse=True)
def fresh_ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have the process look for its device anew, though its group stays."""
    for name in ("SSMSCALE_DEVICE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    ranks_of._joined.cache_clear()
    yield
    ranks_of._joined.cache_clear()


def set_up(
    monkeypatch: pytest.MonkeyPatch, built_for: str | None, environment: dict[str, str], **nvml: Any
) -> None:
    install(monkeypatch, *copies(H100, 0 if "failure" in nvml else 1), **nvml)
    monkeypatch.setattr("torch.version.cuda", built_for)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


FAILURES: dict[str, tuple[str | None, dict[str, str], dict[str, Any], str]] = {
    "CPU build": (
        None,
        {},
        {},
        "is a build for the CPU: install one for CUDA up to 13.0, which the driver takes",
    ),
    "old driver": (
        *("13.0", {}, {"driver": "535.104.05", "cuda": 12020}),
        "driver 535.104.05 for CUDA up to 12.2, and torch VERSION is built for CUDA 13.0; update the driver",
    ),
    "hidden": ("13.0", {"CUDA_VISIBLE_DEVICES": ""}, {}, "CUDA_VISIBLE_DEVICES='' hides 1 GPU"),
    "too few": ("13.0", {"LOCAL_RANK": "1"}, {}, "2 GPUs are needed here, and the driver shows 1 of 1"),
    "no driver": (
        *("13.0", {}, {"failure": "NVML Shared Library Not Found"}),
        "no NVIDIA driver answers (NVML: NVML Shared Library Not Found)",
    ),
    "another reason": ("13.0", {}, {}, "torch VERSION cannot use it: Torch not compiled with CUDA enabled"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_series_that_was_planned_for_a_gpu_fails_with_the_reason_where_there_is_none(
    here: Root, study_fields: Fields, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    built_for, environment, nvml, reason = FAILURES[name]
    set_up(monkeypatch, built_for, environment, **nvml)
    assert train(here, with_iterations(study_fields, 5), device="cuda") == ["failed"]
    for folder in (series_folder(here), *(here.path / "runs").iterdir()):
        *_, last = read_events(folder)
        assert (last["event"], last["kind"]) == (Event.FAILED, "error")
        assert last["reason"].startswith("planned for 1 GPU, but rank 0 of 1 finds no GPU: ")
        assert reason.replace("VERSION", torch.__version__) in last["reason"]


def test_a_nodes_broken_driver_is_blamed_on_the_node(
    here: Root, study_fields: Fields, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_up(monkeypatch, "13.0", {}, failure="RM has detected an NVML/RM version mismatch.")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(NodeFailure, match="Driver/library version mismatch"):
        train(here, study_fields, device="cuda")


def test_launches_that_tell_no_device_take_what_there_is(here: Root, study_fields: Fields) -> None:
    fields = with_iterations(study_fields, 5)
    assert train(here, fields) == ["finished"]
    assert warnings(here) == []


def test_a_process_that_is_kept_to_the_cpu_trains_there_and_warns(
    here: Root, study_fields: Fields, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSMSCALE_DEVICE", "cpu")
    fields = with_iterations(study_fields, 5)
    assert train(here, fields, device="cuda") == ["finished"]
    assert losses(here, fields) == undisturbed(fields)
    assert warnings(here) == ["trains on the CPU (SSMSCALE_DEVICE is cpu), where the plan counted on a GPU"]


def warnings(root: Root) -> list[str]:
    return [event["text"] for event in read_events(series_folder(root)) if event["event"] == "warning"]


def test_a_rank_keeps_to_its_share_of_a_gpu_with_its_context_and_of_the_gpus_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept: list[float] = []
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (0, 80 * GIB))
    monkeypatch.setattr("torch.cuda.set_per_process_memory_fraction", kept.append)
    ranks_of._keep_to_share()
    monkeypatch.setenv("SSMSCALE_GPU_SHARE", "0.25")
    ranks_of._keep_to_share()
    threads: list[int] = []
    monkeypatch.setattr("torch.set_num_threads", threads.append)
    monkeypatch.setattr(ranks_of, "_joined", cache(lambda: Ranks(0, 1, "cpu")))
    ranks_of.initialise_ranks(14)
    assert threads == [3]
    assert kept == [pytest.approx(0.25 - CUDA_CONTEXT / (80 * GIB))]


PLANNED = """
import os, sys
import torch.distributed
from datetime import timedelta
from harness.record.root import Launch
from harness.train import ranks
os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "SSMSCALE_MEETING": sys.argv[2]}
os.environ.pop("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", None)
torch.distributed.destroy_process_group()
ranks.meet = lambda *_: torch.distributed.FileStore(sys.argv[2] + "/again", 2)
ranks.why_on_cpu = lambda local_rank: [None, "its GPU is gone"][rank]
launch = Launch(corpus="c", control="c", dispatcher="d", micro_batch=1, device="cuda", wait_seconds=1800)
joined = ranks.initialise_ranks(1, launch)
groups = torch.distributed.distributed_c10d._world.pg_map
ended = [group._get_backend(torch.device("cpu")).options._timeout for group in groups]
later = torch.distributed.new_group([0, 1])._get_backend(torch.device("cpu")).options._timeout
other = ranks.initialise_ranks(1, launch.model_copy(update={"device": None, "wait_seconds": 2.0}))
seconds = {each.total_seconds() for each in [*ended, later]}
print(json.dumps([joined.problem, joined.device, seconds == {7200.0}, other.problem]))
ended = torch.distributed.group.WORLD._get_backend(torch.device("cpu")).options._timeout
assert ended == timedelta(hours=1), ended
assert os.environ["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"] == "7200"
end_at_once(0)
"""


def test_all_ranks_know_that_one_has_no_gpu_and_wait_as_long_as_the_plan_says(tmp_path: Path) -> None:
    ended = run_two(PLANNED, tmp_path)
    assert [rank.returncode for rank in ended] == [0, 0], ended
    first, second = (json.loads(rank.stdout) for rank in ended)
    assert first == second
    reason = "rank 1 of 2 finds no GPU: its GPU is gone"
    assert first == [f"planned for 2 GPUs, but {reason}", "cpu", True, reason]


def mixing_run(architecture: str = "prefix_simba") -> Run:
    text = {"encoder": "frozen", "dim": 768, "max_positions": 64}
    model = {"architecture": architecture, "n_blocks": 24, "d_model": 1024, "d_state": 512, "text": text}
    return made_run(model, frames=2584, batch=64, precision="bf16")


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[Kernels], None]:
    """Make torch report an H100 to this process, with the given kernels."""

    def make(kernels: Kernels) -> None:
        monkeypatch.setattr("torch.cuda.get_device_name", lambda device: H100.name)
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (0, 79 * 2**30))
        monkeypatch.setattr("ssmttm.model.kernels.chosen", lambda: kernels)

    return make


def made_launch(folder: Path) -> Launch:
    facts = {"corpus": folder, "control": folder / "c", "dispatcher": "d", "device": "cuda", "compile": False}
    return Launch.model_validate({**facts, "micro_batch": 16})


def test_without_the_kernels_that_a_plan_counted_on_the_micro_batch_fits_pytorchs_memory(
    here: Root, tmp_path: Path, on_gpu: Callable[[Kernels], None]
) -> None:
    on_gpu(Kernels(reason="mamba-ssm is not installed", misses_package=True))
    run, gpu = mixing_run(), Ranks(0, 1, "cuda:0")
    launch = made_launch(tmp_path)
    layout, (said,) = series_layout(here, [run], launch, gpu)
    assert layout.micro_batch < 16
    assert memory(run, layout, on_cuda=True, is_fused=False).gib.high <= 79
    more = layout.model_copy(update={"micro_batch": 2 * layout.micro_batch})
    assert memory(run, more, on_cuda=True, is_fused=False).gib.high > 79
    assert said.startswith(
        "mixers by torch: mamba-ssm is not installed; the plan counted on the kernels of mamba-ssm"
    )
    assert said.endswith(f"micro-batch {layout.micro_batch} and not 16")
    attending = mixing_run("cross_transformer")
    assert series_layout(here, [attending], launch, gpu)[1] == []


def test_with_the_kernels_nothing_is_said(
    here: Root, tmp_path: Path, on_gpu: Callable[[Kernels], None]
) -> None:
    on_gpu(Kernels("mamba-ssm 2.3.2, causal-conv1d 1.7.0", mixer=print, scan=print))
    launch = made_launch(tmp_path)
    layout, said = series_layout(here, [mixing_run()], launch, Ranks(0, 1, "cuda:0"))
    assert (layout.micro_batch, said) == (16, [])
