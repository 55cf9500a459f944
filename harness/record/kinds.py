"""Kinds of reasons why an attempt stopped or a Run failed; decisions depend on the kind, never on the reason's text."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

ANOTHER_RANKS_SIGNAL = "another rank's signal"
"""Reason why a rank stopped that received no signal itself."""
TIME_LIMIT_SIGNAL = signal.SIGUSR2.name
"""Signal that schedulers send some time before a job's time limit."""
OUT_OF_MEMORY = "out of memory"
"""Beginning of the reason of a preempted event where a Series continues with a smaller micro-batch."""


class Kind(StrEnum):
    """The `kind` of a journal's preempted or failed event."""

    TIME_LIMIT = "time_limit"
    """Preempted: its job's time limit is near."""
    SIGNAL = "signal"
    """Preempted: this rank or another one received a signal."""
    OUT_OF_MEMORY = "out_of_memory"
    """Preempted: it continues with a smaller micro-batch. Failed: there is no smaller one."""
    DISK_FULL = "disk_full"
    """Preempted: its disk is full."""
    STALLED = "stalled"
    """Preempted: no rank moved for long, and its supervisor ended it."""
    DIVERGED = "diverged"
    """Failed: its loss diverged."""
    ERROR = "error"
    """Failed: its worker raised an error."""
    LOST = "lost"
    """Failed: its workers died several times without progress."""

    @classmethod
    def of_signal(cls, name: str | None) -> Kind:
        """Return the kind of a stop by the signal of that name; None stands for another rank's signal."""
        return cls.TIME_LIMIT if name == TIME_LIMIT_SIGNAL else cls.SIGNAL


PREEMPTED = frozenset({Kind.TIME_LIMIT, Kind.SIGNAL, Kind.OUT_OF_MEMORY, Kind.DISK_FULL, Kind.STALLED})
FAILED = frozenset({Kind.DIVERGED, Kind.ERROR, Kind.OUT_OF_MEMORY, Kind.LOST})


def kind_of(event: Mapping[str, Any]) -> Kind | None:
    """Return the kind of a preempted or failed event, else None; old preempted events have only a reason."""
    kind, is_failure = event.get("kind"), event["event"] == "failed"
    if not is_failure and event["event"] != "preempted":
        return None
    if kind in (FAILED if is_failure else PREEMPTED):
        return Kind(kind)
    if is_failure:
        return Kind.ERROR
    reason = str(event.get("reason", ""))
    if reason in signal.Signals.__members__ or reason == ANOTHER_RANKS_SIGNAL:
        return Kind.of_signal(reason)
    return Kind.OUT_OF_MEMORY if reason.startswith(OUT_OF_MEMORY) else Kind.DISK_FULL
