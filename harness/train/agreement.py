"""Agreement of the ranks between two steps, for which none of them waits until the step before has ended.

Each rank reports a number before a step and learns the highest of all before the next one. All ranks learn the same, so
they stop at the same step: one step after the report, whose GPU has by then exchanged it beside its other work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.train.ranks import Ranks

if TYPE_CHECKING:
    import torch


class Agreement:
    """The numbers that ranks exchange, the highest of which counts."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._sent: tuple[torch.Tensor, Any] | None = None
        """The newest exchange: the highest number, on the host, and what to wait for until it is there."""

    def exchange(self, mine: int, *, at_once: bool = False) -> int:
        """Report a number; return the highest that any rank reported in the call before, or `at_once` in this one.

        Collective. In a group of one the number itself is returned.
        """
        if self._ranks.world == 1:
            return mine
        if at_once:
            self._sent = self._send(mine)
            return self._receive()
        highest = self._receive()
        self._sent = self._send(mine)
        return highest

    def _send(self, mine: int) -> tuple[torch.Tensor, Any]:
        import torch
        from torch.distributed import ReduceOp, all_reduce

        device = self._ranks.device
        number = torch.full((1,), mine, device=device)  # made there: a copy would wait for the GPU
        if device == "cpu":
            return number, all_reduce(number, op=ReduceOp.MAX, async_op=True)
        all_reduce(number, op=ReduceOp.MAX)  # NCCL only queues it
        there = torch.empty(1, dtype=number.dtype, pin_memory=True).copy_(number, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return there, event

    def _receive(self) -> int:
        if self._sent is None:
            return 0
        (highest, under_way), self._sent = self._sent, None
        wait = under_way.wait if self._ranks.device == "cpu" else under_way.synchronize
        wait()
        return int(highest)
