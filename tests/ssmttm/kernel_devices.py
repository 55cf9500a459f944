"""The kernels of mamba-ssm and causal-conv1d where tests can run them: on a GPU, and interpreted on the CPU.

Triton's interpreter runs the functions that would be compiled, on tensors of the CPU, and so tests the calls without a
GPU. `make verify` installs its packages into a folder of their own.
"""

import contextlib
import importlib.util
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.nn import functional as F

import ssmttm.model.kernels
from ssmttm.model.kernels import Kernels, load

FOLDER = Path(sys.prefix) / "kernels"


def using(kernels: Kernels) -> contextlib.AbstractContextManager[object]:
    """Compute with other kernels than the chosen ones inside the block."""
    return mock.patch.object(ssmttm.model.kernels, "chosen", lambda: kernels)  # noqa: PT008  # torch.compile traces no mocks


@contextlib.contextmanager
def kernels_on(device: str) -> Iterator[Kernels]:
    """Yield all kernels for tensors of a device; skip the test if they cannot run."""
    if device == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        kernels = load("cuda")
        if kernels.mixer is None:
            pytest.skip(f"the kernels are not complete: {kernels.reason}")
        yield kernels
        return
    if torch.cuda.is_available():
        pytest.skip("the kernels run compiled here, and a process runs them one way or the other")
    # One block size instead of a search that times them.
    variables = {"TRITON_INTERPRET": "1", "MAMBA_DETERMINISTIC": "1"}
    properties = types.SimpleNamespace(multi_processor_count=1)
    with (
        mock.patch.dict(os.environ, variables),
        mock.patch.object(sys, "path", [*sys.path, str(FOLDER)]),
        mock.patch.object(
            ssmttm.model.kernels, "CHUNK", 16
        ),  # the interpreter computes masked positions, too
        mock.patch.object(torch.cuda, "device", return_value=contextlib.nullcontext()),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
    ):
        sys.modules.setdefault("causal_conv1d_cuda", compiled_convolution())
        if importlib.util.find_spec("mamba_ssm") is None:
            pytest.skip(f"no mamba-ssm in {FOLDER}: make verify installs it")
        kernels = load("cpu")
        assert kernels.reason is None, kernels.reason
        yield kernels


def compiled_convolution() -> types.ModuleType:
    """Return a stand-in for causal-conv1d's compiled part, which needs nvcc: torch's convolution with its checks."""
    module = types.ModuleType("causal_conv1d_cuda")

    def check(x, weight):
        assert x.stride(1) == 1
        assert x.shape[1] % 8 == 0
        assert x.stride(2) % 8 == 0
        assert x.stride(0) % 8 == 0
        assert 2 <= weight.shape[1] <= 4

    def convolved(x, weight, bias):
        past = F.pad(x.to(weight.dtype), (weight.shape[1] - 1, 0))
        return past, F.conv1d(past, weight[:, None], bias, groups=len(weight))

    def forward(x, weight, bias, seq_idx, initial_states, out, final_states_out, silu):
        check(x, weight)
        assert silu
        out.copy_(F.silu(convolved(x, weight, bias)[1]))

    def backward(x, weight, bias, dout, seq_idx, initial, d_final, dx, dweight, dbias, d_initial, silu):
        check(x, weight)
        check(dout, weight)
        past, y = convolved(x, weight, bias)
        dy = torch.ops.aten.silu_backward(dout.to(y.dtype), y)
        shape = (list(bias.shape), [1], [0], [1], False, [0], len(weight), [True] * 3)
        d_past, dw, db = torch.ops.aten.convolution_backward(dy, past, weight[:, None], *shape)
        dx.copy_(d_past[..., -x.shape[2] :])
        dweight.copy_(dw[:, 0])
        dbias.copy_(db)

    module.causal_conv1d_fwd, module.causal_conv1d_bwd = forward, backward
    module.causal_conv1d_update = None
    return module
