"""The kernels of a Mamba-2 mixer: those of mamba-ssm and causal-conv1d on CUDA, PyTorch everywhere else.

A process chooses once, so that a run never changes its arithmetic; the layout in a journal and `ssmscale doctor` name
the choice. Parameters are the same.

By default these kernels add some gradients in the order in which their threads finish. Here they are deterministic
unless the environment says otherwise (DETERMINISTIC): a repeated run adds in the same order, as long as the kernels
have the same configurations.

Of mamba-ssm only the Triton kernels are imported: the package itself imports a compiled extension for Mamba-1, which
Mamba-2 does not need and which takes most of the time to build.
"""

import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec, module_from_spec
from typing import Any

import torch
from torch import Tensor

from ssmttm.compat import module_at_import
from ssmttm.errors import InputError

VARIABLE = "SSMSCALE_KERNELS"
"""Environment variable; `torch` keeps a process to PyTorch."""

CHUNK = 256
"""Chunk of the scan in mamba-ssm's kernels, its own default."""

DETERMINISTIC = ("MAMBA_DETERMINISTIC", "CAUSAL_CONV1D_DETERMINISTIC")
"""Environment variables: with 1 each block of threads writes its part of a sum, and the parts are added in order; with
0 the blocks add to the sum as they finish."""


@dataclass(frozen=True)
class Kernels:
    """Functions that replace PyTorch's on one kind of device; None leaves the work to PyTorch."""

    name: str = "torch"
    """Name in a layout: packages and versions, since other kernels add in another order."""
    reason: str | None = None
    """Reason for PyTorch's part in the work; None if it has none."""
    misses_package: bool = False
    """True if a package that the device could use is not installed, or cannot be imported."""
    device: str = "cuda"
    scan: Callable[..., Any] | None = None
    """mamba_ssm's mamba_chunk_scan_combined."""
    gated_norm: Callable[..., Any] | None = None
    """mamba_ssm's rmsnorm_fn."""
    mixer: Callable[..., Any] | None = None
    """mamba_ssm's mamba_split_conv1d_scan_combined: all between a mixer's two projections. It keeps its input and the
    scan's output for the backward pass, and computes the rest again."""
    scan_step: Callable[..., Any] | None = None
    """mamba_ssm's selective_state_update."""
    convolution: Callable[..., Any] | None = None
    """causal_conv1d_fn."""


TORCH = Kernels()


def kernels_for(x: Tensor) -> Kernels:
    """Return the chosen kernels if they work on a tensor's device, else PyTorch."""
    kernels = chosen()
    return kernels if x.device.type == kernels.device else TORCH


def convolves(weight: Tensor) -> bool:
    """Return True if causal-conv1d takes this many channels and taps."""
    return weight.shape[0] % 8 == 0 and 2 <= weight.shape[2] <= 4


@cache
def chosen() -> Kernels:
    """Return the kernels of this process; raises InputError if the environment variable is wrong."""
    wanted = os.environ.get(VARIABLE, "")
    if wanted == "torch":
        return Kernels(reason=f"{VARIABLE} is torch")
    if wanted:
        raise InputError(f"{VARIABLE}: {wanted!r}: must be torch, or unset for the fastest kernels")
    if not torch.cuda.is_available():
        return Kernels(reason="no CUDA device")
    return load("cuda")


def load(device: str) -> Kernels:
    """Return the installed kernels, for tensors of a device, with the reason for missing ones."""
    # Without the last, a deterministic mamba-ssm keeps one configuration of each kernel: the smallest.
    for variable in (*DETERMINISTIC, "TRITON_CACHE_AUTOTUNING"):
        os.environ.setdefault(variable, "1")
    mode = " deterministic" if all(os.environ[variable] == "1" for variable in DETERMINISTIC) else ""
    try:
        with _without_its_init("mamba_ssm"):
            from mamba_ssm.ops.triton import selective_state_update, ssd_combined
    except Exception as error:  # triton looks for a driver and a compiler, and raises errors of many kinds
        return Kernels(reason=_missing("mamba-ssm", error), misses_package=True)
    kernels = Kernels(
        name=f"mamba-ssm {version('mamba-ssm')}{mode}",
        device=device,
        scan=ssd_combined.mamba_chunk_scan_combined,
        gated_norm=ssd_combined.rmsnorm_fn,
        scan_step=selective_state_update.selective_state_update,
    )
    try:
        from causal_conv1d import causal_conv1d_fn
    except Exception as error:
        return replace(kernels, reason=_missing("causal-conv1d", error), misses_package=True)
    return replace(
        kernels,
        name=f"{kernels.name}, causal-conv1d {version('causal-conv1d')}",
        mixer=ssd_combined.mamba_split_conv1d_scan_combined,
        convolution=causal_conv1d_fn,
    )


def _without_its_init(package: str) -> AbstractContextManager[None]:
    """Import submodules of a package inside the block without running its __init__.

    A later import gets the whole package, or its own error.
    """
    spec = find_spec(package) if package not in sys.modules else None
    if spec is None:  # imported whole already, or not installed
        return nullcontext()
    return module_at_import(package, module_from_spec(spec))


def _missing(package: str, error: Exception) -> str:
    try:
        return f"{package} {version(package)} cannot be imported: {type(error).__name__}: {error}"
    except PackageNotFoundError:
        return f"{package} is not installed"
