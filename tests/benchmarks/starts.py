"""Start of a group's ranks: forked from a rank server, against a process of its own each."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from harness.dispatch.fork_server import RankServer
from harness.dispatch.worker_process import RankProcess, environment_of_rank
from harness.train.meeting import make_meeting
from tests.benchmarks.measure import Row, times


def run(*, quick: bool) -> Iterator[Row]:
    """Yield a row for a group of eight ranks; the server has made its imports, as for all groups but the first."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = RankServer(folder / "server.log")
        try:
            _start(folder / "first", 1, server.address)
            sides = [
                [
                    _start(folder / f"{number}-{address is None}", 8, address)
                    for number in range(1 if quick else 3)
                ]
                for address in (server.address, None)
            ]
        finally:
            server.close()
    yield times("starts: eight ranks until ready, forked or plain", *map(np.array, sides))


def _start(folder: Path, count: int, address: str | None) -> float:
    """Start ranks; returns the seconds until the last is ready."""
    make_meeting(folder / "meeting")
    meeting = {"SSMSCALE_MEETING": str(folder / "meeting")}
    begun = time.perf_counter()
    ranks = [
        RankProcess(
            environment_of_rank(rank, count, 1, LOCAL_RANK=str(rank), **meeting), folder / "log", address
        )
        for rank in range(count)
    ]
    while not all(rank.is_ready for rank in ranks):
        for rank in ranks:
            rank.wait_for_reply(1.0)
            if rank.status is not None:
                raise RuntimeError((folder / "log").read_text())
    taken = time.perf_counter() - begun
    for rank in ranks:
        rank.ask_to_stop()
    for rank in ranks:
        rank.end(60.0)
    return taken
