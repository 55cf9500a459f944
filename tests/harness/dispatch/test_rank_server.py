"""Ranks forked by a node's rank server behave like ranks started as plain processes."""

from __future__ import annotations

import os
import selectors
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness.dispatch.fork_server import RankServer, _Server
from harness.dispatch.worker_process import RankProcess, environment_of_rank
from harness.record.journal import Event, read_progress
from harness.record.root import Root
from harness.train.meeting import make_meeting
from tests.harness.journals import read_events
from tests.harness.trainer import losses, prepared
from tests.waiting import PATIENCE, is_running, wait_until


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankServer]:
    made = RankServer(tmp_path_factory.mktemp("server") / "server.log")
    yield made
    made.close()


def start(server: str | None, ranks: int, folder: Path) -> list[RankProcess]:
    """Start a group of ranks on this machine."""
    make_meeting(folder / "meeting")
    return [
        RankProcess(
            environment_of_rank(
                rank, ranks, 1, LOCAL_RANK=str(rank), SSMSCALE_MEETING=str(folder / "meeting")
            ),
            folder / "ranks.log",
            server,
        )
        for rank in range(ranks)
    ]


def outcome(ranks: list[RankProcess]) -> set[str]:
    """Wait for the outcome that all ranks report."""

    def have_replied() -> bool:
        for rank in ranks:
            rank.listen()
        return all(rank.replies or rank.status is not None for rank in ranks)

    wait_until(have_replied)
    return {rank.replies.pop(0) for rank in ranks}


def stop(ranks: list[RankProcess]) -> list[int | None]:
    for rank in ranks:
        rank.ask_to_stop()
    for rank in ranks:
        rank.end(PATIENCE)
    return [rank.status for rank in ranks]


def processes_of(root: Root) -> list[dict[str, Any]]:
    """Return the events of the Series' journals that name the process of an attempt."""
    found = [event for path in root.path.glob("series/*") for event in read_events(path)]
    return [event for event in found if event["event"] in {Event.STARTED, Event.RESUMED}]


def test_forked_ranks_reach_to_the_bit_the_losses_of_plain_ones_which_start_if_there_is_no_server(
    server: RankServer, tmp_path: Path, study_fields: dict[str, Any]
) -> None:
    study_fields["grid"]["sizes"]["xs"]["resources"] = {"ranks": 2}
    reached = []
    for name, address in (("plain", str(tmp_path / "no-server")), ("forked", server.address)):
        root = Root(tmp_path / name)
        ((_, runs),) = prepared(root, study_fields, micro_batch=4)
        ranks = start(address, 2, tmp_path / name)
        for rank in ranks:
            rank.feed([str(root.run(run.run_id)) for run in runs])
        assert outcome(ranks) == {"finished"}, (tmp_path / name / "ranks.log").read_text()
        assert stop(ranks) == [0, 0]
        reached.append(losses(root, study_fields))
    assert reached[0] == reached[1]
    (plain,), (forked,) = (processes_of(Root(tmp_path / name)) for name in ("plain", "forked"))
    assert plain["pid"] != forked["pid"]
    assert plain["versions"] == forked["versions"]
    assert plain["code"] == forked["code"]


def test_a_forked_rank_has_the_exit_status_of_the_signal_that_ended_it(
    server: RankServer, tmp_path: Path
) -> None:
    ranks = start(server.address, 1, tmp_path)
    wait_until(lambda: ranks[0].listen() is None and ranks[0].is_ready)
    ranks[0].signal(signal.SIGKILL)
    ranks[0].end(PATIENCE)
    assert ranks[0].status == -signal.SIGKILL


def test_a_server_outlives_a_client_that_ends_together_with_its_rank() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        server = _Server(listener, on_cuda=False)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        rank = os.posix_spawn("/bin/true", ["true"], {})
        server._ranks[theirs] = rank
        server._selector.register(theirs, selectors.EVENT_READ)
        os.waitid(os.P_PID, rank, os.WEXITED | os.WNOWAIT)
        ours.close()
        server._reap()
        server._receive(theirs)
        assert not server._ranks


@pytest.mark.parametrize("gone", ["client", "server"])
def test_a_forked_rank_saves_and_ends_with_its_client_and_with_its_server(
    server: RankServer, tmp_path: Path, study_fields: dict[str, Any], gone: str
) -> None:
    """The last test of the file, since it ends the server."""
    study_fields["grid"]["iterations"] = [100_000]
    root = Root(tmp_path)
    ((_, runs),) = prepared(root, study_fields, checkpoint_every=1000)
    (rank,) = start(server.address, 1, tmp_path)
    rank.feed([str(root.run(run.run_id)) for run in runs])
    (series,) = root.path.glob("series/*")
    wait_until(lambda: read_progress(series).step > 3)
    (began,) = processes_of(root)
    process = psutil.Process(began["pid"])
    assert process.ppid() != 1
    if gone == "client":
        rank._process._server.close()  # as the kernel does when a process ends, however it ends
    else:
        server.close()
    wait_until(lambda: not is_running(process))
    assert any(event["event"] == Event.PREEMPTED for event in read_events(series))
    wait_until(lambda: gone == "client" or rank.status is not None)
