"""The Ray actor of a rank: it holds the rank's share of a node for as long as it lives, and the process that trains.

The rank is a process of its own and not the actor itself. When Ray ends an actor, with its node's raylet or with the
program that made it, nothing asks the actor first; its child is told by the kernel, saves at its next step and ends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.dispatch.forked_rank import RankServer
from harness.dispatch.rank_process import RankProcess


@dataclass(frozen=True)
class Seat:
    """Where an actor found itself."""

    node: str
    """Ray's id of its node."""
    gpus: tuple[str, ...]
    """The GPUs Ray gave it, as CUDA_VISIBLE_DEVICES names them."""


@dataclass(frozen=True)
class Heard:
    """What a rank had to say."""

    is_ready: bool
    """Whether it has imported what it needs and found the others."""
    outcome: str | None = None
    """How the Series ended that it was fed; None while it trains."""
    status: int | None = None
    """Its exit status; None while it is there."""


class ServerActor:
    """Has the rank server of a node; what it holds of the node is nothing that ranks want."""

    def __init__(self, log: str) -> None:
        self._log = Path(log)
        self._server: RankServer | None = None
        with contextlib.suppress(OSError):
            self._server = RankServer(self._log)

    def address(self) -> str | None:
        """Where ranks are asked for; None where they have to be plain processes."""
        if self._server is not None and not self._server.is_alive:
            self._server = RankServer(self._log)
        return self._server.address if self._server else None


class RankActor:
    """Made on a node by Ray; all its methods run one after the other, so none may take long."""

    def __init__(self) -> None:
        self._process: RankProcess | None = None

    def seat(self) -> Seat:
        """Where it is."""
        import ray

        context = ray.get_runtime_context()
        gpus = context.get_accelerator_ids().get("GPU", [])
        return Seat(context.get_node_id(), tuple(str(gpu) for gpu in gpus))

    def start(self, environment: Mapping[str, str], log: str, server: str | None) -> None:
        """Start the rank, from its node's rank server where there is one."""
        self._process = RankProcess(environment, Path(log), server)

    def feed(self, run_dirs: Sequence[str]) -> None:
        """Have the rank train a Series."""
        self._rank.feed([Path(folder) for folder in run_dirs])

    def hear(self, seconds: float) -> Heard:
        """What the rank says within so many seconds; it is asked again and again."""
        rank = self._rank
        rank.wait_for_word(seconds)
        return Heard(rank.is_ready, rank.replies.pop(0) if rank.replies else None, rank.status)

    def end(self, seconds: float) -> int | None:
        """Have the rank save and end within so many seconds, or be killed; returns its exit status."""
        if self._process is None:
            return None
        self._process.ask_to_stop()
        self._process.end(seconds)
        return self._process.status

    @property
    def _rank(self) -> RankProcess:
        assert self._process is not None
        return self._process
