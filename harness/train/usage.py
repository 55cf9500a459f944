"""What training uses of its machine, as the first rank sees it: sampled now and then, never waited for."""

from __future__ import annotations

import time

import psutil

from harness.common.format import GIB

EVERY_SECONDS = 10.0
"""Least time between two samples."""


class Usage:
    """Samples this process and the device it trains on."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._process = psutil.Process()
        self._process.cpu_percent()  # counts from here
        self._sampled: float | None = None

    def sample(self) -> dict[str, float] | None:
        """CPU and memory of this process, and of its GPU where it has one; None where the last sample is too new.

        CPU is a percentage of one core, memory in GiB; a figure that cannot be had is left out.
        """
        now = time.monotonic()
        if self._sampled is not None and now - self._sampled < EVERY_SECONDS:
            return None
        self._sampled = now
        figures = {
            "cpu_percent": round(self._process.cpu_percent(), 1),
            "memory_gib": round(self._process.memory_info().rss / GIB, 4),
        }
        return figures | (_of_gpu(self._device) if self._device.startswith("cuda") else {})


def _of_gpu(device: str) -> dict[str, float]:
    import torch

    figures = {"gpu_memory_gib": round(torch.cuda.max_memory_allocated(device) / GIB, 4)}
    try:
        figures["gpu_percent"] = float(torch.cuda.utilization(device))
    except Exception:  # it asks a library of the driver's, which may be missing or refuse
        return figures
    return figures
