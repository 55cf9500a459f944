"""What computes a Mamba-2 mixer: the kernels of mamba-ssm and causal-conv1d on CUDA, PyTorch everywhere else.

The choice is made once a process, so that a run never changes its arithmetic under way; it is named in the layout
of a journal and by `ssmscale doctor`. Parameters are the same both ways.

Kernels add up in whatever order their threads finish, so that on CUDA a run is met again to rounding alone. With
MAMBA_DETERMINISTIC=1, CAUSAL_CONV1D_DETERMINISTIC=1 and TRITON_CACHE_AUTOTUNING=1 they keep to one order, slower.

Of mamba-ssm nothing but its Triton kernels is imported: its package imports a compiled extension for Mamba-1, which
Mamba-2 does not need and which takes most of the time to build.
"""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from ssmttm.errors import InputError

VARIABLE = "SSMSCALE_KERNELS"
"""Environment variable that keeps a process to PyTorch where it says `torch`."""

CHUNK = 256
"""Chunk of the scan in mamba-ssm's kernels, its own default."""

NEVER = -1e4
"""A step size before its softplus, which makes it 0 in every floating-point type."""


def scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    chunk_size: int | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor] | None:
    """Return what `ssmttm.model.ssd.ssd_scan` returns of these, or None where no kernel can do it."""
    kernel = kernels_for(x).scan
    if kernel is None:
        return None
    y, state = kernel(
        *(x, dt.float(), A.float(), B, C, chunk_size or CHUNK),
        D=D.float(),
        initial_states=None if initial_state is None else initial_state.float().mT.contiguous(),
        return_final_states=True,
    )
    return y, state.mT  # the kernel's states are (batch, heads, head_dim, d_state)


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, groups: int) -> Tensor | None:
    """Return RMSNorm of x * silu(gate), (batch, length, width), or None where no kernel can do it."""
    kernel = kernels_for(x).gated_norm
    if kernel is None:
        return None
    width = x.shape[-1] // groups
    return kernel(  # type: ignore[no-any-return]
        x, weight, None, z=gate, eps=eps, group_size=width, norm_before_gate=False
    )


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """Return what `ssmttm.model.conv.causal_conv_silu` returns of these, or None where no kernel can do it."""
    kernel = kernels_for(x).convolution
    if kernel is None or not _convolves(weight):
        return None
    if x.stride(0) % 8 or x.stride(1) % 8:  # a slice of rows whose width is not a multiple of 8
        # Not x.contiguous(): a single position of a single row is contiguous to torch, whatever its strides.
        x = x.clone(memory_format=torch.contiguous_format)
    return kernel(x.mT, weight[:, 0], bias, activation="silu").mT  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Kernels:
    """Functions that take the place of PyTorch's on one kind of device; None where PyTorch does it."""

    name: str = "torch"
    """How a layout names them: packages and versions, since other kernels add up in another order."""
    reason: str | None = None
    """Why PyTorch does all of it or a part; None where it does nothing."""
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
    convolution: Callable[..., Any] | None = None
    """causal_conv1d_fn."""


TORCH = Kernels()


def chosen() -> Kernels:
    """Return what this process computes mixers with; raises InputError where the variable says nonsense."""
    return _forced[-1] if _forced else _choose()


def kernels_for(x: Tensor) -> Kernels:
    """Return the chosen kernels if they can work on a tensor, else PyTorch."""
    kernels = chosen()
    return kernels if x.device.type == kernels.device else TORCH


_forced: list[Kernels] = []


@contextmanager
def using(kernels: Kernels) -> Iterator[None]:
    """Compute with other kernels than the chosen ones inside the block: for comparisons."""
    _forced.append(kernels)
    try:
        yield
    finally:
        _forced.pop()


@cache
def _choose() -> Kernels:
    wanted = os.environ.get(VARIABLE, "")
    if wanted == "torch":
        return Kernels(reason=f"{VARIABLE} is torch")
    if wanted:
        raise InputError(f"{VARIABLE}: {wanted!r}: must be torch, or unset for the fastest there is")
    if not torch.cuda.is_available():
        return Kernels(reason="no CUDA device")
    return load("cuda")


def load(device: str) -> Kernels:
    """Return the kernels installed here, for tensors of a device, with the reason for each that is not."""
    try:
        with _without_its_init("mamba_ssm"):
            from mamba_ssm.ops.triton import ssd_combined
    except Exception as error:  # triton looks for a driver and a compiler, and raises whatever it likes
        return Kernels(reason=_missing("mamba-ssm", error), misses_package=True)
    kernels = Kernels(
        name=f"mamba-ssm {version('mamba-ssm')}",
        device=device,
        scan=ssd_combined.mamba_chunk_scan_combined,
        gated_norm=ssd_combined.rmsnorm_fn,
    )
    try:
        from causal_conv1d import causal_conv1d_fn
    except Exception as error:
        return replace(kernels, reason=_missing("causal-conv1d", error), misses_package=True)
    return Kernels(
        **vars(kernels)
        | {
            "name": f"{kernels.name}, causal-conv1d {version('causal-conv1d')}",
            "mixer": ssd_combined.mamba_split_conv1d_scan_combined,
            "convolution": causal_conv1d_fn,
        }
    )


@contextmanager
def _without_its_init(package: str) -> Iterator[None]:
    """Import submodules of a package inside the block without running what it imports for itself."""
    spec = importlib.util.find_spec(package) if package not in sys.modules else None
    if spec is None:  # imported whole already, or not installed
        yield
        return
    sys.modules[package] = importlib.util.module_from_spec(spec)
    try:
        yield
    finally:
        del sys.modules[package]  # whoever imports it later gets all of it, or the error that belongs to it


def _missing(package: str, error: Exception) -> str:
    try:
        return f"{package} {version(package)} cannot be imported: {type(error).__name__}: {error}"
    except PackageNotFoundError:
        return f"{package} is not installed"


def _convolves(weight: Tensor) -> bool:
    """Whether causal-conv1d takes this many channels and taps."""
    return weight.shape[0] % 8 == 0 and 2 <= weight.shape[2] <= 4


def fuses(x: Tensor, conv_weight: Tensor) -> bool:
    """Return whether `fused_mixer` can take the place of a mixer's parts: on this device, at this size."""
    return kernels_for(x).mixer is not None and _convolves(conv_weight)


def fused_mixer(
    projected: Tensor,
    mask: Tensor | None,
    *,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    norm_eps: float,
    groups: int,
) -> Tensor:
    """Return all that lies between a mixer's two projections, (batch, length, d_inner), from one kernel.

    projected: (batch, length, channels), the gate, the convolution's input and the step sizes side by side; step
    sizes of masked positions are overwritten. mask: (batch, length) bool, True = real.
    """
    kernel = kernels_for(projected).mixer
    assert kernel is not None
    heads = dt_bias.shape[0]
    if mask is not None:
        projected[..., -heads:].masked_fill_(~mask[..., None], NEVER)
    return kernel(  # type: ignore[no-any-return]
        projected,
        conv_weight[:, 0],
        conv_bias,
        dt_bias,
        A,
        D,
        CHUNK,
        activation="silu",
        rmsnorm_weight=norm_weight,
        rmsnorm_eps=norm_eps,
        headdim=norm_weight.shape[0] // heads,
        ngroups=groups,
        norm_before_gate=False,
    )
