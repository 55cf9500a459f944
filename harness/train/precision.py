"""The precision of a Run on its device, set in one place."""

from __future__ import annotations

from harness.study.run import Precision
from ssmttm.errors import InputError

_SINCE_AMPERE = "GPUs from Ampere on multiply so"


def multiply_in(precision: Precision, device: str) -> None:
    """Have torch multiply float32 matrices as TF32 on a GPU if a Run asks for it, and in full otherwise.

    bf16 is autocast's affair, and mamba-ssm's kernels multiply float32 as TF32 in any case.
    """
    import torch

    is_tf32 = precision is Precision.TF32 and device.startswith("cuda")
    torch.set_float32_matmul_precision("high" if is_tf32 else "highest")


def check_tf32(precision: Precision, device: str) -> None:
    """Raise InputError if a Run asks for TF32 and its device has none: it would train another Run in silence."""
    if precision is not Precision.TF32:
        return
    import torch

    if not device.startswith("cuda"):
        raise InputError(f"training.precision: tf32: {_SINCE_AMPERE}, and this rank has no GPU")
    if torch.cuda.get_device_capability(device) < (8, 0):
        name = torch.cuda.get_device_name(device)
        raise InputError(f"training.precision: tf32: {_SINCE_AMPERE}, and this rank has {name}")
