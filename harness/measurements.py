"""What a journal says in MLflow's words: metrics with their step and time, and a mark of how many there were.

A mark is kept with the mirrored run. It holds the newest step that was sent and how many steps lie at or below it, so
that a step journalled late (by a later attempt that logs more often, say) is noticed although it lies below the newest.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from harness.journal import Progress
from harness.training.result import Result

VALID_LOSS = "valid_loss"
STEP_METRICS = {
    "loss": "train_loss",
    "lr": "lr",
    "tokens": "tokens",
    "tokens_per_second": "tokens_per_second",
    "grad_norm": "grad_norm",
    "mfu": "mfu",
}
"""Fields of a step event and what they are called in MLflow."""
SYSTEM_METRICS = {
    "cpu_percent": ("system/cpu_utilization_percentage", 1.0),
    "memory_gib": ("system/system_memory_usage_megabytes", 2**30 / 1e6),
    "gpu_percent": ("system/gpu_0_utilization_percentage", 1.0),
    "gpu_memory_gib": ("system/gpu_0_memory_usage_megabytes", 2**30 / 1e6),
}
"""Fields of a system event, the names MLflow's own page looks for, and MLflow's unit over ours."""

Marks = dict[str, tuple[int, int]]
"""By kind of event: the newest step sent, and how many steps there are at or below it."""


class Measured(NamedTuple):
    """One value of one metric."""

    kind: str
    key: str
    step: int
    milliseconds: int
    """The journal's own time of the event: a replay sends the same."""
    value: float


def measured(progress: Progress, result: Result | None = None) -> list[Measured]:
    """Everything a journal measured, by step; with the result of a finished Run as `final.` metrics."""
    found = []
    for step, event in progress.steps.items():
        when = milliseconds(event["t"])
        for name, key in STEP_METRICS.items():
            if name in event:
                found.append(Measured("step", key, step, when, float(event[name])))
    for step, event in progress.evals.items():
        found.append(Measured("eval", VALID_LOSS, step, milliseconds(event["t"]), float(event["loss"])))
    for step, event in progress.systems.items():
        when = milliseconds(event["t"])
        for name, (key, scale) in SYSTEM_METRICS.items():
            if name in event:
                found.append(Measured("system", key, step, when, float(event[name]) * scale))
    if result is not None and progress.result is not None:
        when = milliseconds(progress.result["t"])
        values = result.model_dump(exclude={"loss_codebooks"})
        values |= {f"loss_codebook_{k}": loss for k, loss in enumerate(result.loss_codebooks)}
        found += [
            Measured("final", f"final.{key}", result.step, when, float(value))
            for key, value in values.items()
        ]
    return sorted(found, key=lambda one: (one.step, one.kind))


def result_of(progress: Progress) -> Result | None:
    """The result of a finished Run; None before."""
    if progress.result is None or progress.result.get("event") != "finished":
        return None
    fields = {name: progress.result[name] for name in Result.model_fields if name in progress.result}
    return Result.model_validate(fields) if fields else None


def above(found: Sequence[Measured], marks: Marks) -> tuple[list[Measured], bool]:
    """What lies above the marks; and whether the marks disagree with the journal, when it is all of that kind."""
    pending: list[Measured] = []
    doubtful = False
    for kind, values, steps in _kinds(found):
        newest, count = marks.get(kind, (-1, 0))
        if sum(step <= newest for step in steps) != count:
            doubtful = True
            pending += values
        else:
            pending += [value for value in values if value.step > newest]
    return sorted(pending, key=lambda one: (one.step, one.kind)), doubtful


def marks_after(found: Sequence[Measured], before: Marks) -> Marks:
    """The marks once everything found has been sent; the newest step never goes back."""
    after = dict(before)
    for kind, _, steps in _kinds(found):
        newest = max(before.get(kind, (-1, 0))[0], *steps)
        after[kind] = (newest, len(steps))
    return after


def dump_marks(marks: Marks) -> str:
    """Marks as a tag's text."""
    return json.dumps({kind: list(mark) for kind, mark in sorted(marks.items())}, separators=(",", ":"))


def load_marks(text: str | None) -> Marks:
    """Marks from a tag's text; none where it is missing or no such text, so that the store is asked."""
    try:
        held: Any = json.loads(text or "{}")
        return {str(kind): (int(newest), int(count)) for kind, (newest, count) in held.items()}
    except (ValueError, TypeError, AttributeError):
        return {}


def last_sign(progress: Progress) -> float | None:
    """Time (s) of the newest event of a journal that carries one, or None."""
    events: list[Mapping[str, Any]] = [event for event in (progress.started, progress.result) if event]
    events += [held[max(held)] for held in (progress.steps, progress.evals, progress.systems) if held]
    return max((float(event["t"]) for event in events), default=None)


def milliseconds(seconds: float) -> int:
    """MLflow's unit of time."""
    return int(seconds * 1000)


def _kinds(found: Iterable[Measured]) -> list[tuple[str, list[Measured], set[int]]]:
    by_kind = groupby(sorted(found, key=lambda one: one.kind), key=lambda one: one.kind)
    return [(kind, held := list(values), {value.step for value in held}) for kind, values in by_kind]
