"""How a mirrored run stands, from its journals: RUNNING, or over since when and why.

What is not over is only called KILLED by a mirroring that settles: one that comes after the training it knows of, or
`ssmscale sync`. A process of another host cannot be asked: it counts as gone once its journal has been still for long.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from harness.journal import Event, Progress
from harness.measurements import last_sign, milliseconds
from harness.status import RunState, RunStatus

STILL_SECONDS = 900.0
"""After so long without a line, a process that cannot be asked is taken for gone."""
OVER = frozenset({RunState.DONE, RunState.FAILED})
WAITING = frozenset({RunState.RUNNING, RunState.QUEUED})


@dataclass(frozen=True)
class Ending:
    """What MLflow is to say of a run."""

    status: str
    """RUNNING, FINISHED, FAILED or KILLED."""
    milliseconds: int | None = None
    """When it ended; of a killed one, the last sign of life."""
    reason: str | None = None


def ending_of_run(row: RunStatus, own: Progress, *, settle: bool) -> Ending | None:
    """Of a Run with a journal; None where MLflow's word may stand."""
    if row.state is RunState.DONE:
        return Ending("FINISHED", _end(own))
    if row.state is RunState.FAILED:
        return Ending("FAILED", _end(own), str(row.reason))
    return _unfinished(row.state, own, settle=settle)


def ending_of_series(
    rows: Sequence[RunStatus], own: Mapping[str, Progress], trunk: Progress, *, settle: bool
) -> Ending | None:
    """Of a Series, whose story is over when that of all its Runs is; None where MLflow's word may stand."""
    states = {row.state for row in rows}
    end = max((_end(progress) or 0 for progress in (trunk, *own.values())), default=0)
    if states <= {RunState.DONE, RunState.CANCELLED} and RunState.DONE in states:
        return Ending("FINISHED", end)
    if states <= OVER | {RunState.CANCELLED} and RunState.FAILED in states:
        failed = [row for row in rows if row.state is RunState.FAILED]
        return Ending("FAILED", end, f"{len(failed)} of {len(rows)} runs failed: {failed[0].reason}")
    if states & WAITING:
        return Ending("RUNNING")
    state = RunState.CANCELLED if states <= {RunState.CANCELLED} else RunState.INTERRUPTED
    return _unfinished(state, trunk if trunk.attempt else next(iter(own.values())), settle=settle)


def ending_of_study(rows: Sequence[RunStatus], *, settle: bool) -> Ending | None:
    """Of the study's own run."""
    states = {row.state for row in rows}
    now = milliseconds(time.time())
    if states & WAITING:
        return Ending("RUNNING")
    if states <= {RunState.DONE, RunState.CANCELLED}:
        return Ending("FINISHED", now)
    if states <= OVER | {RunState.CANCELLED}:
        failed = sum(row.state is RunState.FAILED for row in rows)
        return Ending("FAILED", now, f"{failed} of {len(rows)} runs failed")
    left = sum(row.state not in OVER | {RunState.CANCELLED} for row in rows)
    return Ending("KILLED", now, f"{left} of {len(rows)} runs are left to train") if settle else None


def ending_unlisted(progress: Progress) -> Ending | None:
    """Of a run that is RUNNING in MLflow while its study lists it no more."""
    if progress.attempt == 0:
        return Ending("KILLED", None, "its study lists it no more, and it has no journal here")
    if progress.state == Event.FINISHED:
        return Ending("FINISHED", _end(progress))
    if progress.state == Event.FAILED:
        return Ending("FAILED", _end(progress), str((progress.result or {}).get("reason")))
    return _unfinished(RunState.RUNNING if progress.is_alive else RunState.INTERRUPTED, progress, settle=True)


def may_live_elsewhere(progress: Progress) -> bool:
    """Whether its process is on a host that cannot be asked and has written lately."""
    if progress.state not in {Event.STARTED, Event.RESUMED} or progress.started is None:
        return False
    if progress.started.get("host") == socket.gethostname():
        return False
    return time.time() - (last_sign(progress) or 0.0) < STILL_SECONDS


def _unfinished(state: RunState, progress: Progress, *, settle: bool) -> Ending | None:
    if state in WAITING:
        return Ending("RUNNING")
    if not settle or may_live_elsewhere(progress):
        return None
    return Ending("KILLED", _end(progress), f"{state}: no process trains it")


def _end(progress: Progress) -> int | None:
    when = last_sign(progress)
    return None if when is None else milliseconds(when)
