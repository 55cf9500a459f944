"""Do one part of a larger work: some tracks of a corpus, or some prompts of an evaluation.

    python -m harness.train.part ORDER      the ORDER of a task as JSON

A part has a folder of its own with a journal, a heartbeat, a lock and a log, as a Series has, so that backends run,
watch and restart it in the same way. What it computes is kept in small steps by the function that does the work, which
begins again where it was stopped.
"""

from __future__ import annotations

import argparse
import faulthandler
import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from pydantic import JsonValue

from harness.common.disk import disk_full, is_full, make_folder, naming_a_full_disk
from harness.common.process import (
    end_at_once,
    identify_process,
    log_to_stderr,
    print_traceback,
    sent_to,
)
from harness.common.streams import flush_or_drop
from harness.common.validation import validate
from harness.record.heartbeat import Activity, Heartbeat
from harness.record.journal import Event, Fenced, Journal, read_progress
from harness.record.kinds import Kind
from harness.record.nodes import NodeFailure, node_failure_in
from harness.record.provenance import installed_version, running_code
from harness.record.series import SeriesLock, scheduler_job
from harness.study.run import Frozen
from harness.train.stopping import EXIT_PREEMPTED, GPU_SHARE, STACK_SIGNAL, StopFlag, exit_status
from ssmttm.errors import InputError
from ssmttm.files import parse_json

log = logging.getLogger("ssmscale.part")

WORK = {"corpus": "harness.corpora.part:work", "evaluation": "harness.evaluate.part:work"}
"""Module and function that does each kind of work, imported when it is first needed."""
KEEP_SECONDS = 5.0
"""Least time between two records of a part's steps: each is flushed to the disk."""


class Stopped(Exception):
    """The part was told to stop."""


class Order(Frozen):
    """The part that a worker is to do, and the kind of its work."""

    does: str
    """Kind of its work, a key of WORK."""
    folder: Path
    request: dict[str, JsonValue]
    """The work, in the words of its kind."""


class AtWork:
    """The part that is being worked on: the function that does the work reports its steps here."""

    def __init__(self, folder: Path, journal: Journal, heartbeat: Heartbeat, stop: StopFlag) -> None:
        self.folder = folder
        self._journal, self._heartbeat, self._stop = journal, heartbeat, stop
        self._keep_at = 0.0

    def should_stop(self) -> bool:
        """True if the process was told to stop."""
        return self._stop.reason is not None

    def moved(self, step: int, of: int | None = None) -> None:
        """Report that `step` steps are done and kept, of so many if that is known.

        Raises Stopped if the process was told to stop, Fenced if another one has taken the part over, and DiskFull.
        """
        self._heartbeat.move(Activity.STEP, step)
        now = time.monotonic()
        if now >= self._keep_at or step == of or self.should_stop():
            self._keep_at = now + KEEP_SECONDS
            self._journal.append(Event.CHECKPOINT, step=step, **({} if of is None else {"of": of}))
        if self.should_stop():
            raise Stopped


def main(arguments: Sequence[str] | None = None) -> int:
    """Do one part; return 0 when done, 1 if it failed, 2 for bad input, 74 if the disk is full, 75 if preempted."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.train.part", description="Do one part of a work."
    )
    parser.add_argument("order", metavar="ORDER", help="the order as JSON")
    parser.add_argument(
        "--supervised", action="store_true", help="exit with 0 if the journal holds the outcome"
    )
    options = parser.parse_args(arguments)
    log_to_stderr()
    faulthandler.register(STACK_SIGNAL)
    stop = StopFlag()
    stop.install()

    def run() -> int:
        outcome = work_on(parse_json(options.order), stop)
        log.info("%s", outcome)
        status = {"finished": 0, "failed": 1}.get(outcome, EXIT_PREEMPTED)
        return 0 if options.supervised and status in {1, EXIT_PREEMPTED} else status

    try:
        return exit_status(run, log)
    finally:
        flush_or_drop()


Ending = Literal["finished", "failed", "preempted", "busy"]


def work_on(order: Any, stop: StopFlag) -> Ending:
    """Do the part of an order unless it is done; return how it ended, `busy` if another process works on it.

    Raises InputError if the order is not one, NodeFailure, and DiskFull.
    """
    part = validate(Order, order, "order")
    if part.does not in WORK:
        raise InputError(f"order: does: {part.does!r}: no such work; this version knows {', '.join(WORK)}")
    make_folder(part.folder / "logs")
    lock = SeriesLock(part.folder)
    with sent_to(part.folder / "logs" / "rank-0.log"):
        if not lock.acquire():
            return "busy"
        try:
            with naming_a_full_disk(part.folder):
                return _work_locked(part, stop)
        finally:
            lock.release()


def _work_locked(part: Order, stop: StopFlag) -> Ending:
    before = read_progress(part.folder)
    if before.state == Event.FINISHED:
        return "finished"
    with Journal.open(part.folder) as journal, Heartbeat(part.folder, 0) as heartbeat:
        journal.append(Event.RESUMED if before.attempt else Event.STARTED, **_describe_process())
        try:
            _function(part.does)(part.request, AtWork(part.folder, journal, heartbeat, stop))
            journal.append(Event.FINISHED)
        except Stopped:
            log.info("stopped by %s", stop.reason)
            journal.append(Event.PREEMPTED, reason=stop.reason, kind=Kind.of_signal(stop.reason))
            return "preempted"
        except Fenced:
            return "busy"
        except Exception as error:
            return _fail(part, journal, error)
    return "finished"


def _fail(part: Order, journal: Journal, error: Exception) -> Ending:
    """Record why a part failed, or raise what is no failure of the part: a full disk, a bad node."""
    if not isinstance(error, InputError):
        print_traceback()
    if is_full(error):
        full = disk_full(part.folder, error)
        journal.leave(Kind.DISK_FULL, str(full))
        raise full from error
    reason = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
    if scheduler_job() is not None and (failure := node_failure_in(reason)) is not None:
        raise NodeFailure(f"{part.folder.name}: {failure}") from error
    log.error("%s", reason)
    journal.append(Event.FAILED, reason=reason, kind=Kind.ERROR)
    return "failed"


def _function(does: str) -> Callable[[Mapping[str, JsonValue], AtWork], None]:
    module, _, name = WORK[does].partition(":")
    function: Callable[[Mapping[str, JsonValue], AtWork], None] = getattr(import_module(module), name)
    return function


def _describe_process() -> dict[str, Any]:
    job, share = scheduler_job(), os.environ.get(GPU_SHARE)
    return {
        **identify_process(),
        "job_id": job.job_id if job else str(os.getpid()),
        "python": platform.python_version(),
        "versions": {"ssmscale": installed_version("ssmscale")},
        "code": running_code(),
        **({"gpu_share": float(share)} if share else {}),
    }


if __name__ == "__main__":
    # Under its own name, so that its exceptions are those that the work raises.
    end_at_once(import_module("harness.train.part").main(sys.argv[1:]))
