"""A machine's own GPUs are planned for as those of a profile, and the devices that a process may not use are not."""

from __future__ import annotations

import builtins
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.common import gpus
from harness.common.format import GIB, Estimate
from harness.common.gpus import read_gpus
from harness.dispatch import local
from harness.dispatch.base import SubmitTarget, Task
from harness.dispatch.local import LocalBackend
from harness.plan import cluster
from harness.plan.cluster import Cluster, this_machine
from harness.plan.peaks import peak_flops
from harness.plan.resources import Resources, choose_resources
from harness.record.journal import read_progress
from harness.record.root import Root, read_launch
from harness.study.run import Run
from harness.study.schema import ResourceChoice
from ssmttm.errors import InputError
from tests.conftest import Command, Write
from tests.harness.conftest import PlanOf
from tests.harness.nvml import H100, RTX_4090, SLICE_OF_A100, Card, copies, install
from tests.harness.plan.runs import made_run
from tests.studies import Fields, with_iterations

A100 = Card("NVIDIA A100-SXM4-80GB", 81920, slices=(SLICE_OF_A100, SLICE_OF_A100))
FACTS = {"n_codebooks": 4, "codebook_size": 1024, "frames": 2584, "clips": 50_000}


@pytest.fixture
def large(study_fields: Fields, tmp_path: Path) -> Fields:
    """A study of a model of 281 million parameters, whose corpus is elsewhere."""
    study_fields["corpus"] = {"path": str(tmp_path / "elsewhere"), "facts": FACTS}
    study_fields["model"] = {"d_state": 512}
    study_fields["grid"]["sizes"] = {"l": {"n_params": 281e6, "d_model": 1024}}
    study_fields["grid"]["iterations"] = [20_000]
    study_fields["training"] |= {"batch": 128, "precision": "bf16"}
    return study_fields


def run_of(n_blocks: int, d_model: int) -> Run:
    text = {"encoder": "frozen", "dim": 768, "max_positions": 64}
    model = {"architecture": "prefix_simba", "n_blocks": n_blocks, "d_model": d_model, "text": text}
    return made_run(model, frames=1024, batch=8)


def profile_of(folder: Path, **fields: Any) -> Path:
    path = folder / "profile.yaml"
    keys = {"name": "same", "partitions": "[gpu]", "limits": "{hours: 200}", **fields}
    path.write_text("".join(f"{key}: {value}\n" for key, value in keys.items()))
    return path


@pytest.mark.parametrize(
    ("cards", "unsupported", "described"),
    [
        (copies(H100, 8), (), {"gpus": 8, "gpu_memory_gib": 79.6, "peaks": (989e12, 67e12)}),
        ([RTX_4090], (), {"gpus": 1, "gpu_memory_gib": 23.5, "peaks": (165e12, 82.6e12)}),
        # WSL2: NVML answers in part, and the memory includes what the driver keeps.
        (
            [Card(RTX_4090.name, 24564)],
            ("nvmlDeviceGetMigMode", "nvmlDeviceGetUUID", "nvmlDeviceGetMaxMigDeviceCount"),
            {"gpus": 1, "gpu_memory_gib": 23.5, "peaks": (165e12, 82.6e12)},
        ),
        ([A100], (), {"gpus": 2, "gpu_memory_gib": 39.5, "peaks": (312e12 * 3 / 7, 19.5e12 * 3 / 7)}),
    ],
    ids=["8 H100", "RTX 4090", "WSL2", "MIG"],
)
def test_own_gpus_are_planned_for_as_the_same_machine_of_a_profile(
    large: Fields,
    plan_of: PlanOf,
    ssmscale: Command,
    write_study: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cards: list[Card],
    unsupported: tuple[str, ...],
    described: dict[str, Any],
) -> None:
    install(monkeypatch, *cards, unsupported=unsupported)
    monkeypatch.setattr(cluster, "usable_cores", lambda: 16)
    bf16, fp32 = described.pop("peaks")
    peaks = f"{{bf16: {bf16}, fp32: {fp32}}}"
    profile = profile_of(tmp_path, **described, cores=16, memory_gib=1900, peak_flops=peaks)
    here, there = plan_of(large), plan_of(large, "--cluster", profile)
    (mine,), (same,) = here["runs"], there["runs"]
    for key in ("micro_batch", "accumulation", "gpus", "zero_stage", "gpu_fraction"):
        assert mine[key] == same[key]
    assert mine["micro_batch"] < 128
    assert mine["wall_hours"] == pytest.approx(same["wall_hours"], rel=0.15)
    assert "gpu_peak_unknown" not in {note["code"] for note in here["design"]["notes"]}


def test_a_submission_here_starts_what_was_planned_and_workers_without_a_gpu_fail_with_the_reason(
    study_fields: Fields,
    plan_of: PlanOf,
    write_study: Write,
    ssmscale: Command,
    tracked_root: Root,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, *copies(H100, 2))
    monkeypatch.setattr(cluster, "usable_memory", lambda: 1900 * GIB)
    monkeypatch.delenv("SSMSCALE_DEVICE", raising=False)
    fields = with_iterations(study_fields, 5) | {"root": str(tracked_root.path)}
    (planned,) = plan_of(fields)["runs"]
    said = ssmscale("submit", write_study(fields), "--on", "local")
    assert said.status == 1, said.err
    launch = read_launch(tracked_root, planned["series"])
    assert (launch.device, launch.micro_batch) == ("cuda", planned["micro_batch"])
    reason = read_progress(tracked_root.run(planned["run_id"])).result["reason"]
    assert "planned for 1 GPU, but rank 0 of 1 finds no GPU: torch " in reason
    assert "is a build for the CPU: install one for CUDA" in reason


@pytest.mark.parametrize(
    ("cards", "more", "visible"),
    [
        (copies(H100, 2), {}, ["GPU-00000000-0000", "GPU-00000001-0000"]),
        ([RTX_4090], {}, ["GPU-00000000-0000"]),
        ([RTX_4090], {"unsupported": ("nvmlDeviceGetUUID",)}, ["0"]),
        ([Card(H100.name, 81559, is_hidden=True), *copies(H100, 1)], {}, ["GPU-00000001-0000"]),
        ([A100], {}, ["MIG-00000000-0000", "MIG-00000000-0001"]),
        ([], {"failure": "NVML Shared Library Not Found"}, [""]),
    ],
    ids=["2 H100", "RTX 4090", "WSL2", "container", "MIG", "none"],
)
def test_series_here_get_a_device_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cards: list[Card], more: Any, visible: list[str]
) -> None:
    slices = tuple(copies(SLICE_OF_A100, 2))
    install(monkeypatch, *(replace(card, slices=card.slices and slices) for card in cards), **more)
    monkeypatch.setattr(cluster, "usable_cores", lambda: 1)
    shown: list[str] = []

    def group(*arguments: Any) -> Any:
        shown.append(arguments[-1])
        return SimpleNamespace(handle="a job")

    monkeypatch.setattr(local, "_Group", group)
    backend = LocalBackend(tmp_path, SubmitTarget("local"))
    while backend._idle_group(Task(series_id="s", run_dirs=(tmp_path,))) is not None:
        pass
    assert shown == visible


def test_an_unknown_gpu_is_named_with_the_key_that_tells_its_peak(
    large: Fields, plan_of: PlanOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, Card("NVIDIA X9000", 98304))
    notes = {note["code"]: note["text"] for note in plan_of(large)["design"]["notes"]}
    assert notes["gpu_peak_unknown"].startswith("the bf16 peak of NVIDIA X9000 is not known")
    assert "resources.peak_flops" in notes["gpu_peak_unknown"]
    large["resources"] = {"peak_flops": 1e15}
    assert "gpu_peak_unknown" not in {note["code"] for note in plan_of(large)["design"]["notes"]}


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("", []),
        ("-1", []),
        ("1", ["GPU-00000001-0000"]),
        ("2,0", ["GPU-00000002-0000", "GPU-00000000-0000"]),
        ("0,7,1", ["GPU-00000000-0000"]),  # what CUDA does not know ends the list
        ("1,1", []),
        ("GPU-00000002", ["GPU-00000002-0000"]),
        ("GPU-0000000", []),  # of several
        ("MIG-00000003-0001,0", ["MIG-00000003-0001", "GPU-00000000-0000"]),
        ("3", ["MIG-00000003-0000"]),  # of a GPU that is cut CUDA takes the first slice
        ("GPU-00000003", ["MIG-00000003-0000"]),
    ],
)
def test_hidden_devices_are_not_used(
    monkeypatch: pytest.MonkeyPatch, visible: str, expected: list[str]
) -> None:
    same = [Card("NVIDIA A100-SXM4-80GB", 81920) for _ in range(3)]
    install(monkeypatch, *same, Card(A100.name, 81920, slices=tuple(copies(SLICE_OF_A100, 2))))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = read_gpus()
    assert ([gpu.handle for gpu in found.devices], found.present) == (expected, 5)
    assert this_machine().device_names == tuple(expected)


def test_a_container_with_fewer_gpus_counts_only_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = Card(H100.name, 81559, is_hidden=True)
    install(monkeypatch, refused, *copies(H100, 2))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")  # CUDA counts what it may open
    assert [gpu.handle for gpu in read_gpus().devices] == ["GPU-00000002-0000"]


def test_of_unlike_gpus_the_weakest_is_planned_for(monkeypatch: pytest.MonkeyPatch) -> None:
    small = Card("NVIDIA GeForce RTX 3060", 12288)
    install(monkeypatch, small, RTX_4090)
    here = this_machine()
    assert (here.gpus, here.gpu_type, here.gpu_memory_gib) == (2, small.name, 12.0)
    monkeypatch.setenv(
        "CUDA_VISIBLE_DEVICES", "0"
    )  # CUDA's first is the fastest, NVML's the first on the bus
    assert (this_machine().gpu_memory_gib, this_machine().device_names) == (12.0, ("0",))


def test_a_gpu_without_memory_of_its_own_counts_half_of_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Card("NVIDIA GB10", None))
    here = this_machine()
    assert here.gpu_memory_gib == pytest.approx(here.memory_gib / 2)


@pytest.mark.parametrize("failure", ["NVML Shared Library Not Found", "Driver Not Loaded"])
def test_without_a_driver_the_plan_is_for_cpu_ranks(monkeypatch: pytest.MonkeyPatch, failure: str) -> None:
    install(monkeypatch, failure=failure)
    assert (this_machine().gpus, this_machine().device_kind) == (0, "core")
    assert failure in str(read_gpus().problem)


def test_without_the_package_of_nvml_gpus_are_counted_and_the_package_is_named(
    large: Fields, plan_of: PlanOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "proc" / "0000:01:00.0").mkdir(parents=True)
    (tmp_path / "proc" / "0000:01:00.0" / "information").write_text("Model: \t\t NVIDIA H100 PCIe\n")
    monkeypatch.setattr(gpus, "PROC", tmp_path / "proc")
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    imported = builtins.__import__

    def without(name: str, *arguments: Any, **more: Any) -> Any:
        if name == "pynvml":
            raise ModuleNotFoundError(name=name)
        return imported(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert (this_machine().gpus, this_machine().gpu_type) == (1, "NVIDIA H100 PCIe")
    notes = {note["code"]: note["text"] for note in plan_of(large)["design"]["notes"]}
    assert "pip install nvidia-ml-py" in notes["gpu_memory_unknown"]


def test_slices_train_no_series_together(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Card(A100.name, 81920, slices=tuple(copies(SLICE_OF_A100, 2))))
    run = run_of(2, 64)
    assert choose_resources(run, ResourceChoice(ranks=None), this_machine()).layout.ranks == 1
    with pytest.raises(InputError, match=r"MIG slices \(.*3g.40gb\) train no series together"):
        choose_resources(run, ResourceChoice(ranks=2), this_machine())


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("h100", 989.4e12),
        ("rtx4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA RTX 6000 Ada Generation", 364.4e12),
        ("Quadro RTX 6000", None),
        ("NVIDIA A30 MIG 2g.12gb", 82.5e12),
        ("nvidia_a100_1c.3g.20gb", 312e12 / 7),
        (None, None),
    ],
)
def test_a_peak_is_found_by_the_whole_name(name: str | None, bf16: float | None) -> None:
    assert peak_flops(name, "bf16") == (bf16 if bf16 is None else pytest.approx(bf16))


@pytest.mark.parametrize(
    ("name", "tf32"), [("NVIDIA H100", 494.7e12), ("RTX 4090", 82.6e12), ("V100", 15.7e12)]
)
def test_tf32_runs_at_half_the_rate_of_bf16_where_a_gpu_has_it(name: str, tf32: float) -> None:
    assert peak_flops(name, "tf32") == pytest.approx(tf32)


def test_a_rank_has_its_gpus_share_of_the_nodes_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, *copies(H100, 8))
    monkeypatch.setattr(cluster, "usable_cores", lambda: 112)
    monkeypatch.setattr(cluster, "usable_memory", lambda: 1900 * GIB)
    small = run_of(1, 64)
    large = run_of(40, 2048)
    for run in (small, large):
        assert choose_resources(run, ResourceChoice(), this_machine()).layout.threads == 14
    assert choose_resources(large, ResourceChoice(threads=3), this_machine()).layout.threads == 3


def test_the_hosts_memory_bounds_ranks_shares_and_series_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, *copies(H100, 8))

    def chosen(run: Run, gib: int, **choice: Any) -> Resources:
        monkeypatch.setattr(cluster, "usable_memory", lambda: gib * GIB)
        return choose_resources(run, ResourceChoice(**choice), this_machine())

    small, large = run_of(1, 64), run_of(40, 2048)
    assert chosen(small, 1900).gpu_fraction < 1
    assert chosen(small, 32).gpu_fraction == 1
    alone = chosen(large, 64)
    assert (alone.layout, "host_memory" in alone.why) == (chosen(large, 1900).layout, False)
    assert "GiB of the host's" in chosen(large, 64, ranks=2).why["host_memory"]
    hours = {"hours": lambda layout: Estimate(*[100 / layout.ranks] * 3)}
    fewest = [
        choose_resources(
            large, ResourceChoice(ranks=None), Cluster("c", 1, 8, 112, gib, {}, 79.6, hours=1), **hours
        )
        for gib in (1900.0, 64.0)
    ]
    assert [one.layout.ranks for one in fewest] == [8, 1]
    starved = chosen(large, 16, ranks=None)
    assert (starved.layout.ranks, "host's memory is short" in starved.why["ranks"]) == (1, True)
    backend = LocalBackend(tmp_path, SubmitTarget("local"))
    assert backend.most_groups == 8
    task = Task(series_id="s", run_dirs=(tmp_path,), host_gib=alone.host_gib)
    backend.submit([task])
    assert backend.most_groups == int(32 / alone.host_gib) < 8
