"""A journal as MLflow sees it: its metrics, marks of those that were sent, and the status of its run.

A tag of the mirrored run holds the marks: for each kind of event the newest step sent and the number of steps up to it.
The count reveals a step that was journalled late and lies below the newest, as after an attempt that logs more often.

A run that is not over becomes KILLED only in a mirroring that settles, at the end of a submission or in `ssmscale
sync`. A process on another host cannot be checked: it counts as gone once its journal has not grown for a while.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

from harness.record.journal import Event, Progress
from harness.record.result import Result
from harness.record.root import Root
from harness.record.scores import evaluations_of
from harness.record.status import OVER, RunState, RunStatus
from ssmttm.files import parse_json

METRICS: Mapping[str, Mapping[str, str]] = {
    "step": {
        "loss": "train_loss",
        **{name: name for name in ("lr", "tokens", "tokens_per_second", "grad_norm", "mfu")},
    },
    "eval": {"loss": "valid_loss"},
    "system": {
        "cpu_percent": "system/cpu_utilization_percentage",
        "memory_gib": "system/system_memory_usage_megabytes",
        "gpu_percent": "system/gpu_0_utilization_percentage",
        "gpu_memory_gib": "system/gpu_0_memory_usage_megabytes",
    },
}
"""MLflow's names by kind of event and field; MLflow's page expects those of `system`."""
MEGABYTES_PER_GIB = 2**30 / 1e6

Marks = dict[str, tuple[int, int]]
"""By kind of event: the newest step sent, and the number of steps up to it."""
STILL_SECONDS = 900.0
"""Time without a line after which a process on another host counts as gone."""
WAITING = frozenset({RunState.RUNNING, RunState.QUEUED})


def milliseconds(seconds: float) -> int:
    """Convert to MLflow's unit of time."""
    return int(seconds * 1000)


class Measured(NamedTuple):
    """One value of one metric."""

    kind: str
    key: str
    step: int
    milliseconds: int
    """Time of the event in the journal, the same in every replay."""
    value: float


def measured(progress: Progress, *, is_run: bool) -> list[Measured]:
    """List all values of a journal by step, with the result of a finished Run as `final.` metrics."""
    found = []
    sources = (("step", progress.steps), ("eval", progress.evals), ("system", progress.systems))
    for kind, events in sources:
        for step, event in events.items():
            when = milliseconds(event["t"])
            found += [
                Measured(
                    kind, key, step, when, float(event[name]) * (MEGABYTES_PER_GIB if "gib" in name else 1)
                )
                for name, key in METRICS[kind].items()
                if name in event
            ]
    end = progress.result
    if is_run and end is not None and end["event"] == Event.FINISHED:
        result, when = Result.of_event(end), milliseconds(end["t"])
        values = result.model_dump(exclude={"loss_codebooks"})
        values |= {f"loss_codebook_{k}": loss for k, loss in enumerate(result.loss_codebooks)}
        found += [
            Measured("final", f"final.{key}", result.step, when, float(value))
            for key, value in values.items()
        ]
    return sorted(found, key=lambda one: (one.step, one.kind))


def evaluation_metrics(root: Root, run_id: str, iterations: int) -> list[Measured]:
    """List the evaluations of one Run as metrics: `eval/SETTINGS/METRIC`, at the Run's last step."""
    return [
        Measured("eval", f"eval/{evaluation.name}/{metric}", iterations, milliseconds(score.t), score.value)
        for evaluation in evaluations_of(root, run_id)
        for metric, score in evaluation.scores.items()
    ]


def above(found: Sequence[Measured], marks: Marks) -> tuple[list[Measured], bool]:
    """Return the values above the marks, and True if a count disagrees; then all values of that kind are included."""
    pending: list[Measured] = []
    disagree = False
    for kind, values, steps in _kinds(found):
        newest, count = marks.get(kind, (-1, 0))
        if sum(step <= newest for step in steps) != count:
            disagree = True
            pending += values
        else:
            pending += [value for value in values if value.step > newest]
    return sorted(pending, key=lambda one: (one.step, one.kind)), disagree


def marks_after(found: Sequence[Measured], before: Marks) -> Marks:
    """Return the marks for the time when all values have been sent; the newest step never decreases."""
    after = dict(before)
    for kind, _, steps in _kinds(found):
        newest = max(before.get(kind, (-1, 0))[0], *steps)
        after[kind] = (newest, len(steps))
    return after


def dump_marks(marks: Marks) -> str:
    """Return marks as a tag's text."""
    return json.dumps({kind: list(mark) for kind, mark in sorted(marks.items())}, separators=(",", ":"))


def load_marks(text: str | None) -> Marks:
    """Read marks from a tag's text; a missing or invalid text gives none, so that the store is queried."""
    try:
        held: Any = parse_json(text or "{}")
        return {str(kind): (int(newest), int(count)) for kind, (newest, count) in held.items()}
    except (ValueError, TypeError, AttributeError):
        return {}


@dataclass(frozen=True)
class MlflowStatus:
    """The status that MLflow should show of a run."""

    status: str
    """RUNNING, FINISHED, FAILED or KILLED."""
    milliseconds: int | None = None
    """Its end; of a killed run, its last event."""
    reason: str | None = None


def status_of_run(row: RunStatus, own: Progress, *, settle: bool) -> MlflowStatus | None:
    """Return the status of a Run with a journal; None leaves MLflow's as it is."""
    if row.state is RunState.DONE:
        return MlflowStatus("FINISHED", _end(own))
    if row.state is RunState.FAILED:
        return MlflowStatus("FAILED", _end(own), str(row.reason))
    return _unfinished(row.state, own, settle=settle)


def status_of_series(
    rows: Sequence[RunStatus], journals: Mapping[str, Progress], series_id: str, *, settle: bool
) -> MlflowStatus | None:
    """Return the status of a Series, which ends with the last of its Runs; None leaves MLflow's as it is."""
    states = {row.state for row in rows}
    end = max(_end(progress) or 0 for progress in journals.values())
    if states <= {RunState.DONE, RunState.CANCELLED} and RunState.DONE in states:
        return MlflowStatus("FINISHED", end)
    if states <= OVER and RunState.FAILED in states:
        failed = [row for row in rows if row.state is RunState.FAILED]
        return MlflowStatus("FAILED", end, f"{len(failed)} of {len(rows)} runs failed: {failed[0].reason}")
    if states & WAITING:
        return MlflowStatus("RUNNING")
    state = RunState.CANCELLED if states <= {RunState.CANCELLED} else RunState.INTERRUPTED
    trunk, first = journals[series_id], journals[rows[0].run_id]
    return _unfinished(state, trunk if trunk.attempt else first, settle=settle)


def status_of_study(rows: Sequence[RunStatus], *, settle: bool) -> MlflowStatus | None:
    """Return the status of the run of kind study; None leaves MLflow's as it is."""
    states = {row.state for row in rows}
    now = milliseconds(time.time())
    if states & WAITING:
        return MlflowStatus("RUNNING")
    if states <= {RunState.DONE, RunState.CANCELLED}:
        return MlflowStatus("FINISHED", now)
    if states <= OVER:
        failed = sum(row.state is RunState.FAILED for row in rows)
        return MlflowStatus("FAILED", now, f"{failed} of {len(rows)} runs failed")
    left = sum(row.state not in OVER for row in rows)
    return MlflowStatus("KILLED", now, f"{left} of {len(rows)} runs are left to train") if settle else None


def status_of_unlisted(progress: Progress) -> MlflowStatus | None:
    """Return the status of a run that is RUNNING in MLflow and that its study no longer lists."""
    if progress.attempt == 0:
        return MlflowStatus("KILLED", None, "its study no longer lists it, and it has no journal here")
    if progress.state == Event.FINISHED:
        return MlflowStatus("FINISHED", _end(progress))
    if progress.state == Event.FAILED:
        return MlflowStatus("FAILED", _end(progress), str((progress.result or {}).get("reason")))
    return _unfinished(RunState.RUNNING if progress.is_alive else RunState.INTERRUPTED, progress, settle=True)


def may_live_elsewhere(progress: Progress) -> bool:
    """True if its process is on another host and has written lately."""
    if not progress.is_open or progress.started is None:
        return False
    if progress.started.get("host") == socket.gethostname():
        return False
    return is_recent(last_sign(progress) or 0.0)


def is_recent(seconds: float) -> bool:
    """True if a process that wrote at that time may live, wherever it is."""
    return time.time() - seconds < STILL_SECONDS


def _unfinished(state: RunState, progress: Progress, *, settle: bool) -> MlflowStatus | None:
    if state in WAITING:
        return MlflowStatus("RUNNING")
    if not settle or may_live_elsewhere(progress):
        return None
    return MlflowStatus("KILLED", _end(progress), f"{state}: no process trains it")


def _end(progress: Progress) -> int | None:
    when = last_sign(progress)
    return None if when is None else milliseconds(when)


def last_sign(progress: Progress) -> float | None:
    """Return the time (s) of a journal's newest event; None before any."""
    events: list[Mapping[str, Any]] = [event for event in (progress.started, progress.result) if event]
    events += [held[max(held)] for held in (progress.steps, progress.evals, progress.systems) if held]
    return max((float(event["t"]) for event in events), default=None)


def _kinds(found: Iterable[Measured]) -> list[tuple[str, list[Measured], set[int]]]:
    by_kind = groupby(sorted(found, key=lambda one: one.kind), key=lambda one: one.kind)
    return [(kind, held := list(values), {value.step for value in held}) for kind, values in by_kind]
