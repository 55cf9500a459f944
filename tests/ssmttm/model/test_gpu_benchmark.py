"""What measures a GPU runs on a CPU too, at another size: it does not rot where nobody has one."""

import pytest
import torch

from ssmttm.model.architecture import ARCHITECTURES
from ssmttm.model.kernels import TORCH
from tests.benchmarks import gpu

TINY = gpu.Size(n_blocks=2, d_model=64, d_state=8, frames=12, text_positions=3, batch=2, square=64)


@pytest.mark.parametrize("compiler", [None, pytest.param("eager", marks=pytest.mark.verify)])
def test_every_backbone_is_measured_every_way(compiler):
    rows = list(gpu.measure(TINY, "cpu", TORCH, rounds=1, compiler=compiler))
    for architecture in ARCHITECTURES:
        ways = ["as it is", "activation checkpointing", *(["torch.compile"] if compiler else [])]
        for way in [*ways, "by PyTorch"] if architecture.is_recurrent else ways:
            speed, peak = [row for row in rows if row.what.startswith(f"{architecture} {way}:")]
            assert float(speed.ours) > 0, speed
            assert "of the ceiling" in speed.ratio
            assert peak.ours.endswith("GiB")
            assert bool(peak.baseline) == (way != "as it is")


def test_without_a_gpu_one_line_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    (row,) = gpu.run(quick=True)
    assert "no CUDA device" in row.what
