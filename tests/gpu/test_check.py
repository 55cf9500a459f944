"""The GPU check can be rehearsed without a GPU, and says what is missing, or wrong."""

import subprocess
import sys

import pytest
import torch

from ssmttm.model.flops import parameter_count
from ssmttm.model.kernels import TORCH, Kernels
from tests.conftest import REPOSITORY
from tests.gpu.__main__ import PHASES
from tests.gpu.kernels import compared
from tests.gpu.machine import machine
from tests.gpu.sizes import BLOCKS, FULL, TINY, TOKENS_PER_SECOND


def test_pytorch_agrees_with_itself_and_a_wrong_kernel_does_not():
    assert all(agrees for agrees, _ in compared(TINY, TORCH))
    wrong = Kernels(device="cpu", convolution=lambda x, weight, bias, **_: x * weight.sum() + bias[:, None])
    assert [agrees for agrees, _ in compared(TINY, wrong)] == [False, False, True]


def test_without_a_gpu_the_missing_things_are_named(capsys):
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    machine(FULL)
    said = capsys.readouterr().out
    assert "FAIL torch can use no GPU" in said
    assert ("built for the CPU" in said) == (torch.version.cuda is None)


def test_every_backbone_has_281_m_parameters_and_a_prediction():
    assert BLOCKS.keys() == TOKENS_PER_SECOND.keys()
    for architecture in BLOCKS:
        assert FULL.config(architecture).architecture == architecture
        assert parameter_count(FULL.config(architecture)).n_params == pytest.approx(281e6, rel=0.03)


@pytest.mark.verify
def test_every_phase_is_rehearsed(tmp_path):
    command = [sys.executable, "-m", "tests.gpu", "--tiny", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert done.stdout == (tmp_path / "check.txt").read_text()
    for name in PHASES.keys() - {"machine"}:
        assert f"NOTE {name}: " in done.stdout
