"""Check that a requested device exists before anything is loaded onto it."""

from ssmttm.errors import InputError


def usable_device(device: str) -> str:
    """Return the device if torch can use it here; raises InputError that lists the devices it can use."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    usable = ["cpu", *(["cuda"] if gpus else []), *(f"cuda:{index}" for index in range(gpus))]
    if device not in usable:
        raise InputError(f"--device {device}: no such device here; torch can use {', '.join(usable)}")
    return device


def best_device() -> str:
    """Return a GPU if torch can use one here, else the CPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
