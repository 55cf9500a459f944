"""The doctor names the GPUs, their driver and torch's CUDA, and what to do where these do not fit together."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from harness.doctor.cluster import gpus_of_node
from harness.doctor.machine import gpus_here, torch_device
from harness.plan.cluster import Profile
from tests.harness.nvml import H100, RTX_4090, SLICE_OF_A100, Card, copies, install

PROFILE: dict[str, Any] = {"name": "c", "partitions": ["p"], "gpus": 8, "cores": 64, "memory_gib": 900}


def test_gpus_and_driver_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, *copies(H100, 8))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    found = gpus_here()
    said = "2 x NVIDIA H100 80GB HBM3 (79.6 GiB), 6 more hidden by CUDA_VISIBLE_DEVICES"
    assert (found.works, found.found) == (True, f"{said}, driver 580.65.06 for CUDA up to 13.0")


@pytest.mark.parametrize(
    ("card", "unsupported", "said"),
    [
        (RTX_4090, (), "NVIDIA GeForce RTX 4090 (23.5 GiB), driver"),
        (
            RTX_4090,
            ("nvmlDeviceGetUUID", "nvmlDeviceGetMigMode"),
            "NVIDIA GeForce RTX 4090 (23.5 GiB), driver",
        ),
        (
            Card("NVIDIA A100-SXM4-80GB", 81920, slices=(SLICE_OF_A100,)),
            (),
            f"{SLICE_OF_A100.name} (39.5 GiB)",
        ),
        (Card("NVIDIA A100-SXM4-80GB", 81920, slices=()), (), "MIG is on and no slice is made"),
        (Card(H100.name, 81559, is_hidden=True), (), "no GPU, driver 580.65.06"),
        (Card("NVIDIA GB10", None), (), "the driver tells no memory of NVIDIA GB10"),
    ],
    ids=["RTX 4090", "WSL2", "MIG", "MIG without slices", "container", "shared memory"],
)
def test_the_doctor_tells_what_the_driver_shows(
    monkeypatch: pytest.MonkeyPatch, card: Card, unsupported: tuple[str, ...], said: str
) -> None:
    install(monkeypatch, card, unsupported=unsupported)
    assert said in gpus_here().found


def test_an_unknown_gpu_has_a_remedy_and_a_machine_without_one_has_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, Card("NVIDIA X9000", 98304))
    assert "resources.peak_flops" in str(gpus_here().remedy)
    install(monkeypatch, failure="NVML Shared Library Not Found")
    assert gpus_here().works
    assert torch_device().works


def test_a_driver_too_old_for_torch_is_named_with_both_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, H100, driver="535.104.05", cuda=12020)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    found = torch_device()
    assert "built for CUDA 13.0; driver 535.104.05 for CUDA up to 12.2" in found.found
    assert f"torch {torch.__version__} is built for CUDA 13.0; update the driver" in str(found.remedy)


def test_in_a_job_the_gpus_of_a_node_are_compared_with_the_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Card("NVIDIA A100-SXM4-40GB", 40960))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    profile = Profile.model_validate({**PROFILE, "gpu_memory_gib": 79.6, "gpu_type": "h100"})
    assert "srun --partition=p --gpus=1 ssmscale doctor" in gpus_of_node(profile).found
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    remedy = str(gpus_of_node(profile).remedy)
    assert remedy == "set in the profile gpu_memory_gib: 40.0; peak_flops: {bf16: 3.12e+14} and not 9.89e+14"
    fitting = Profile.model_validate({**PROFILE, "gpu_memory_gib": 39.4, "gpu_type": "a100"})
    assert gpus_of_node(fitting).works
