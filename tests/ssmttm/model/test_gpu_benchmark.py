"""The GPU benchmark also runs on a CPU, at another size, so that tests without a GPU cover it."""

import pytest
import torch

from ssmttm.model.architecture import ARCHITECTURES
from ssmttm.model.kernels import TORCH
from tests.benchmarks import gpu

TINY = gpu.Size(n_blocks=2, d_model=64, d_state=8, frames=12, text_positions=3, batch=2, square=64)


@pytest.mark.parametrize("compiler", [None, pytest.param("eager", marks=pytest.mark.verify)])
def test_every_backbone_is_measured_in_every_variant(compiler):
    rows = list(gpu.measure(TINY, "cpu", TORCH, rounds=1, compiler=compiler))
    for architecture in ARCHITECTURES:
        ways = ["as it is", "activation checkpointing", *(["torch.compile"] if compiler else [])]
        for way in [*ways, "by PyTorch"] if architecture.is_recurrent else ways:
            speed, peak = [row for row in rows if row.what.startswith(f"{architecture} {way}:")]
            assert float(speed.ours) > 0, speed
            assert "of the ceiling" in speed.ratio
            assert peak.ours.endswith("GiB")
            assert bool(peak.baseline) == (way != "as it is")


def test_a_missing_gpu_is_reported_in_one_line():
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    (row,) = gpu.run(quick=True)
    assert "no CUDA device" in row.what
