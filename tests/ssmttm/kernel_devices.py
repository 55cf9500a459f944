"""The kernels of mamba-ssm and causal-conv1d where tests can run them: on a GPU, and without one in two ways.

Triton's interpreter runs the functions that would be compiled, on tensors of the CPU, and so tests the calls. Its
compiler compiles them for GPUs that are not there, and so tests that they fit. `make verify` installs the packages into
a folder of their own.
"""

import contextlib
import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
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
    if not FOLDER.is_dir():
        pytest.skip(f"no mamba-ssm in {FOLDER}: make verify installs it")
    # One block size instead of a search that times them, and short chunks: masked positions are computed, too.
    variables = {"TRITON_INTERPRET": "1", "TRITON_CACHE_AUTOTUNING": "0"}
    with (
        _on_the_cpu(variables) as kernels,
        mock.patch.object(ssmttm.model.kernels, "scan_chunk", return_value=16),
    ):
        yield kernels


class Launch(NamedTuple):
    """A launch of a kernel, which was compiled for it."""

    kernel: str
    config: str
    """Block sizes, warps and stages."""
    shared: int
    """Shared memory of a block, in bytes."""


@contextlib.contextmanager
def kernels_compiled_for(
    capability: int, times: Iterator[float] | None = None
) -> Iterator[tuple[Kernels, list[Launch]]]:
    """Yield all kernels, and a list of their launches: each compiles for GPUs of a compute capability, and no more.

    Triton chooses among configurations by `times`, those of one after the other; without times all are compiled. For a
    process that does nothing else.
    """
    launches: list[Launch] = []
    with _on_the_cpu({"TRITON_INTERPRET": "0"}) as kernels:
        from triton.runtime import driver
        from triton.runtime.autotuner import Autotuner
        from triton.runtime.jit import JITFunction

        run = JITFunction.run

        def compile_one(self, *args, grid, warmup, **settings):
            compiled = run(self, *args, grid=grid, warmup=True, **settings)
            words = {name: value for name, value in settings.items() if name.startswith(("BLOCK", "num_"))}
            config = ", ".join(f"{name} {value}" for name, value in words.items())
            launches.append(Launch(self.__name__, config, compiled.metadata.shared))

        def compile_all(self, *args, **settings):
            self.nargs = dict(zip(self.arg_names, args, strict=False))
            for config in self.prune_configs(settings):
                self.fn.run(*args, **settings, **config.all_kwargs())
                self.best_config = config  # mamba-ssm looks at it

        driver.set_active(_AbsentGpu(capability, times))
        with (
            mock.patch.object(JITFunction, "run", compile_one),
            mock.patch.object(Autotuner, "run", Autotuner.run if times else compile_all),
        ):
            yield kernels, launches


class _AbsentGpu:
    """As much of Triton's driver as compiling and choosing need."""

    def __init__(self, capability: int, times: Iterator[float] | None) -> None:
        self._capability, self._times = capability, times

    def get_benchmarker(self) -> Callable[..., list[float]]:
        def time(launch, quantiles):
            launch()
            return [next(self._times)] * len(quantiles)

        return time

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> object:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._capability, 32)


@contextlib.contextmanager
def _on_the_cpu(variables: dict[str, str]) -> Iterator[Kernels]:
    """Yield all kernels for tensors of the CPU, as they are loaded under variables of the environment."""
    properties = types.SimpleNamespace(multi_processor_count=1)
    with (
        mock.patch.dict(os.environ, variables),
        mock.patch.object(sys, "path", [*sys.path, str(FOLDER)]),
        mock.patch.object(torch.cuda, "device", return_value=contextlib.nullcontext()),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
    ):
        sys.modules.setdefault("causal_conv1d_cuda", compiled_convolution())
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
