"""The kernels of a Mamba-2 mixer: those of mamba-ssm and causal-conv1d on CUDA, PyTorch everywhere else.

A process chooses once, so that a run never changes its arithmetic; the layout in a journal and `ssmscale doctor` name
the choice. Parameters are the same. causal-conv1d is the installed package; where that cannot be imported, the
prebuilt one of a lock file, if SSMSCALE_KERNELS names one; else PyTorch convolves.

Kernels add in the order in which their threads finish, so that on CUDA a repeated run agrees to rounding. With
MAMBA_DETERMINISTIC=1, CAUSAL_CONV1D_DETERMINISTIC=1 and TRITON_CACHE_AUTOTUNING=1 they keep to one order, slower.

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
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ssmttm.compat import module_at_import
from ssmttm.errors import InputError
from ssmttm.model.prebuilt import at_import, load_prebuilt

VARIABLE = "SSMSCALE_KERNELS"
"""Environment variable: `torch` keeps a process to PyTorch, the path of a kernels.lock allows a prebuilt kernel."""

CHUNK = 256
"""Chunk of the scan in mamba-ssm's kernels, its own default."""


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
    if wanted and not Path(wanted).is_file():
        raise InputError(
            f"{VARIABLE}: {wanted!r}: must be torch, the path of a kernels.lock, or unset for installed kernels"
        )
    if not torch.cuda.is_available():
        return Kernels(reason="no CUDA device")
    return load("cuda", Path(wanted) if wanted else None)


def load(device: str, lock: Path | None = None) -> Kernels:
    """Return the kernels for tensors of a device, with the reason for missing ones; `lock` allows a prebuilt one."""
    module, name, reason = _convolution(lock)
    try:
        with _without_its_init("mamba_ssm"), at_import(module):
            from mamba_ssm.ops.triton import selective_state_update, ssd_combined
    except Exception as error:  # triton looks for a driver and a compiler, and raises errors of many kinds
        return Kernels(reason=_missing("mamba-ssm", error), misses_package=True)
    kernels = Kernels(
        name=f"mamba-ssm {version('mamba-ssm')}",
        device=device,
        scan=ssd_combined.mamba_chunk_scan_combined,
        gated_norm=ssd_combined.rmsnorm_fn,
        scan_step=selective_state_update.selective_state_update,
    )
    if module is None:
        return replace(kernels, reason=reason, misses_package=True)
    return replace(
        kernels,
        name=f"{kernels.name}, {name}",
        mixer=ssd_combined.mamba_split_conv1d_scan_combined,
        convolution=module.causal_conv1d_fn,
    )


def _convolution(lock: Path | None) -> tuple[ModuleType | None, str, str | None]:
    """Return causal-conv1d and its name, or the reason why there is none."""
    try:
        import causal_conv1d

        return causal_conv1d, f"causal-conv1d {version('causal-conv1d')}", None
    except Exception as error:
        reason = _missing("causal-conv1d", error)
    if lock is None:
        return None, "", reason
    try:
        return *load_prebuilt(lock), None
    except Exception as error:
        return None, "", f"{reason}; {VARIABLE}: {lock}: {_in_short(error)}"


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
        return f"{package} {version(package)} cannot be imported: {_in_short(error)}"
    except PackageNotFoundError:
        return f"{package} is not installed"


def _in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
