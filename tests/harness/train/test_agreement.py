"""The ranks of a Series stop at the same step, and a rank that fails alone ends at once."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.dispatch import local, worker_process
from harness.record import checkpoints
from harness.record.jobs import JobState
from harness.record.journal import Event, read_progress
from harness.record.kinds import Kind
from harness.record.root import Root
from harness.train.agreement import Agreement
from harness.train.ranks import Ranks
from harness.train.stopping import EXIT_PREEMPTED, StopFlag, exit_status
from harness.train.worker import _work_fed
from tests.harness.faults import train_on_two_ranks, work
from tests.harness.trainer import prepared
from tests.studies import tiny_study, with_iterations
from tests.waiting import wait_until

SIGNALLED = 3
"""Step after which the second rank receives a signal."""


def work_signalled(run_dirs: Sequence[str], environment: dict[str, str]) -> None:
    """Train as a worker does; the second rank alone is told to stop."""
    from harness.train.engine import Engine

    step, taken = Engine.step, [0]

    def then_signal(engine: Engine, *arguments: Any) -> None:
        step(engine, *arguments)
        taken[0] += 1
        if environment["RANK"] == "1" and taken[0] == SIGNALLED:
            os.kill(os.getpid(), signal.SIGTERM)

    Engine.step = then_signal
    work(run_dirs, environment)


def test_a_signal_to_one_rank_is_answered_by_all_after_at_most_one_more_step(
    tiny_corpus: Path, tmp_path: Path
) -> None:
    root, fields = Root(tmp_path / "runs"), with_iterations(tiny_study(tiny_corpus), 30)
    ((_, (run,)),) = prepared(root, fields, zero_stage=1, log_every=1)
    train_on_two_ranks([root.run(run.run_id)], tmp_path / "meeting", work_signalled, status=EXIT_PREEMPTED)
    series = root.series(run.series_id)
    progress = read_progress(series)
    assert (progress.state, progress.kind) == (Event.PREEMPTED, Kind.SIGNAL)
    (saved,) = checkpoints.marked(series / "checkpoints")
    assert SIGNALLED <= saved.marker.step <= SIGNALLED + 1
    assert max(progress.steps) == saved.marker.step


def test_a_group_of_one_hears_itself_at_once() -> None:
    assert [Agreement(Ranks(0, 1, "cpu")).exchange(number) for number in (0, 2, 1)] == [0, 2, 1]


def test_a_rank_that_exits_alone_ends_with_its_status(caplog: pytest.LogCaptureFixture) -> None:
    def run() -> int:
        sys.exit(EXIT_PREEMPTED)

    assert exit_status(run, logging.getLogger("test")) == EXIT_PREEMPTED


def test_one_of_several_warm_ranks_ends_if_it_cannot_read_its_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = [str(tmp_path / "missing")]
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert _work_fed(order, StopFlag()) == "failed"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        _work_fed(order, StopFlag())


def test_a_rank_that_fails_alone_ends_its_peers_within_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert worker_process.ALONE_SECONDS + worker_process.KILL_SECONDS <= 60
    program = f"""
import os, signal, sys, time
deaf = {str(tmp_path / "deaf")!r}
if os.environ["RANK"] == "0":
    sys.stdin.readline()
    while not os.path.exists(deaf):
        time.sleep(0.01)
    sys.exit({EXIT_PREEMPTED})
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as one that waits for the other on its GPU
open(deaf, "w").close()
time.sleep(600)
"""
    monkeypatch.setattr(worker_process, "PLAIN", [sys.executable, "-c", program])
    monkeypatch.setattr(local, "ALONE_SECONDS", 0.5)
    group = local._Group(2, 1, [0, 1], tmp_path, "")
    handle: Any = SimpleNamespace(task=SimpleNamespace(folder=tmp_path, stall_seconds=600.0, order="order"))
    try:
        group.feed(handle)
        ended: list[Any] = []
        wait_until(lambda: ended.append(group.poll()) or ended[-1])
        assert ended[-1] == (handle, JobState.PREEMPTED)
        assert group.is_gone
    finally:
        group.end()
    assert [process.status for process in group._processes] == [EXIT_PREEMPTED, -signal.SIGKILL]
