"""Where torch computes: a device that was asked for and is not here is refused before anything is loaded onto it."""

from __future__ import annotations

from ssmttm.errors import InputError


def usable_device(device: str) -> str:
    """The device itself where torch can compute on it here; raises InputError saying which ones it can use."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    usable = ["cpu", *(["cuda"] if gpus else []), *(f"cuda:{index}" for index in range(gpus))]
    if device not in usable:
        raise InputError(f"--device {device}: there is none here; torch can use {', '.join(usable)}")
    return device
