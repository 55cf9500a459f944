"""Ranks tell each other values and errors, and execute nothing that another process sends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from harness.train.meeting import make_meeting
from tests.harness.fuzzing import Planted
from tests.waiting import PATIENCE

JOIN = """
import json, sys
from pathlib import Path
import torch
from harness.common.disk import DiskFull
from harness.common.process import end_at_once
from harness.record.checkpoints import Checkpoint, Marker
from harness.record.journal import Fenced
from harness.train.meeting import meet
from harness.train.ranks import Ranks
from ssmttm.errors import InputError
rank = int(sys.argv[1])
torch.distributed.init_process_group("gloo", store=meet(Path(sys.argv[2]), rank, 2), rank=rank, world_size=2)
ranks = Ranks(rank, 2, "cpu")
"""
TELL = """
import psutil
open_to = {each.laddr.ip for each in psutil.Process().net_connections() if each.status == psutil.CONN_LISTEN}
assert open_to == {"127.0.0.1"}, open_to
marker = Marker(step=3, tokens=24, ranks=2, zero_stage=1, branch=True, loss=0.1, files={}).sealed()
found = Checkpoint(Path("/a/b"), "step-000000003", marker)
mine = lambda value, other: value if ranks.is_first else other
assert ranks.broadcast(mine(found, None), Checkpoint | None) == found
assert ranks.broadcast(mine(None, found), Checkpoint | None) is None
assert ranks.broadcast(mine({"ä", "b"}, set()), set[str]) == {"ä", "b"}
assert ranks.run_on_first(lambda: found, Checkpoint) == found
errors = [DiskFull("/full", 5), DiskFull("/ro", is_read_only=True), Fenced("newer"), InputError("key"),
          MemoryError("CUDA out of memory"), KeyError("gone")]
for error in errors:
    def fail():
        raise error
    try:
        ranks.run_on_first(fail)
    except Exception as told:
        print(json.dumps([type(told).__name__, str(told)]))
end_at_once(0)  # as workers end: a process group left to the interpreter's end aborts now and then
"""
ATTACK = """
from tests.harness.fuzzing import Planted
planted = Planted(Path(sys.argv[3]))
if rank == 0:
    torch.distributed.broadcast_object_list([planted], src=0)
else:
    ranks.broadcast(None, bool)
"""


def run_two(program: str, tmp_path: Path, *arguments: str) -> Sequence[subprocess.CompletedProcess[str]]:
    """Run a program on two ranks, which meet as those of a job do."""
    make_meeting(tmp_path / "meeting")
    environment = {name: value for name, value in os.environ.items() if name != "GLOO_SOCKET_IFNAME"}
    commands = [
        [sys.executable, "-c", JOIN + program, str(rank), str(tmp_path / "meeting"), *arguments]
        for rank in range(2)
    ]
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for command in commands
    ]
    return [
        subprocess.CompletedProcess(process.args, process.wait(), *said)
        for process in started
        for said in [process.communicate(timeout=PATIENCE)]
    ]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Sequence[list[list[str]]]:
    """The errors that each rank raised, after it had seen the same values."""
    ended = run_two(TELL, tmp_path_factory.mktemp("told"))
    assert [rank.returncode for rank in ended] == [0, 0], ended
    return [[json.loads(line) for line in rank.stdout.splitlines()] for rank in ended]


def test_all_ranks_raise_the_errors_of_the_first_on_which_their_end_depends(
    told: Sequence[list[list[str]]],
) -> None:
    first, other = told
    assert other[:5] == first[:5]
    assert [kind for kind, _ in first] == [
        *("DiskFull", "DiskFull", "Fenced", "InputError", "MemoryError", "KeyError")
    ]
    assert other[5] == ["FirstRankFailed", "KeyError: 'gone'"]


def test_nothing_that_another_process_sends_is_executed(planted: Planted, tmp_path: Path) -> None:
    _, victim = run_two(ATTACK, tmp_path, str(planted.folder))
    assert victim.returncode != 0  # it does not take the pickle for a value either
    planted.assert_not_executed()
