"""The batch of the next step, made while a GPU computes this one.

A thread makes it on the host in page-locked memory, as one block: a step then costs one copy to the GPU, which the GPU
does among its other work and for which nothing waits. Where the host itself computes, a thread would take the core of
the step, and batches are made between steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from harness.train.batches import MicroBatch, StepBatch

if TYPE_CHECKING:
    import torch

ALIGNMENT = 256
"""Each tensor of a block begins at a multiple of so many bytes, as torch's own do on a GPU."""


def computes_apart(device: str) -> bool:
    """Return True if a device computes beside the host's cores."""
    return device.startswith("cuda")


class Ahead(AbstractContextManager["Ahead"]):
    """The batches of a rank's steps, on its device."""

    def __init__(self, make: Callable[[int], StepBatch], device: str) -> None:
        """Take batches from `make`, which makes that of a step on the host."""
        self._make, self._device = make, device
        self._thread: ThreadPoolExecutor | None = None
        self._next: tuple[int, Future[_Block]] | None = None
        if computes_apart(device):
            self._thread = ThreadPoolExecutor(1, "batches", initializer=self._use_device)

    def take(self, step: int, end: int) -> StepBatch:
        """Return the batch of a step, and begin the next one unless that is `end`; raises what `make` raises."""
        if self._thread is None:
            made = self._make(step)
            return StepBatch([batch.to(self._device) for batch in made.micro_batches], made.n_targets)
        if self._next is not None and self._next[0] == step:
            future = self._next[1]
        else:  # the first, or one after a jump to another step
            future = self._thread.submit(self._packed, step)
        self._next = None
        block = future.result()
        if step + 1 < end:
            self._next = step + 1, self._thread.submit(self._packed, step + 1)
        return block.on(self._device)

    def _packed(self, step: int) -> _Block:
        return _Block(self._make(step), pinned=self._device.startswith("cuda"))

    def _use_device(self) -> None:
        """Choose the rank's GPU: page-locked memory would else make a context on the first one of the node."""
        import torch

        if self._device.startswith("cuda"):
            torch.cuda.set_device(self._device)

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)


class _Block:
    """The tensors of a step's batch, one after the other in one tensor of bytes."""

    def __init__(self, batch: StepBatch, *, pinned: bool) -> None:
        import torch

        self._n_targets = batch.n_targets
        self._micro_batches: list[list[tuple[int, int, torch.dtype, torch.Size]]] = []
        """First byte, number of bytes, type and shape of each tensor, by micro-batch."""
        end = 0
        for micro_batch in batch.micro_batches:
            self._micro_batches.append([])
            for tensor in micro_batch.tensors():
                self._micro_batches[-1].append((end, tensor.nbytes, tensor.dtype, tensor.shape))
                end += math.ceil(tensor.nbytes / ALIGNMENT) * ALIGNMENT
        self._bytes = torch.empty(end, dtype=torch.uint8, pin_memory=pinned)
        for micro_batch, parts in zip(batch.micro_batches, self._micro_batches, strict=True):
            for tensor, (first, size, *_) in zip(micro_batch.tensors(), parts, strict=True):
                self._bytes[first : first + size].copy_(tensor.contiguous().view(-1).view(torch.uint8))

    def on(self, device: str) -> StepBatch:
        """Return the batch on a device, to which it is copied at once."""
        there = self._bytes.to(device, non_blocking=True)
        micro_batches = [
            MicroBatch.of(
                *(there[at : at + size].view(dtype).view(shape) for at, size, dtype, shape in parts)
            )
            for parts in self._micro_batches
        ]
        return StepBatch(micro_batches, self._n_targets)
