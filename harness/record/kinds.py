"""Why an attempt stopped or a Run failed, as one word: decisions rest on it, and never on the text beside it."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

ANOTHER_RANKS_SIGNAL = "another rank's signal"
"""Why a rank stopped that was told nothing itself."""
TIME_LIMIT_SIGNAL = signal.SIGUSR2.name
"""What schedulers are asked to send some time before a job's time is over."""
OUT_OF_MEMORY = "out of memory"
"""What the reason of a preempted event begins with, where a Series goes on with a smaller micro-batch."""


class Kind(StrEnum):
    """The `kind` of a journal's preempted or failed event."""

    TIME_LIMIT = "time_limit"
    """Preempted: the time of its job is nearly over."""
    SIGNAL = "signal"
    """Preempted: this rank, or another one, was told to stop."""
    OUT_OF_MEMORY = "out_of_memory"
    """Preempted: it is to go on with a smaller micro-batch. Failed: there is no smaller one."""
    DISK_FULL = "disk_full"
    """Preempted: there is no room to save anything."""
    DIVERGED = "diverged"
    """Failed: its loss left all bounds."""
    ERROR = "error"
    """Failed: its worker raised an error."""
    LOST = "lost"
    """Failed: its workers went away again and again without gaining anything."""

    @classmethod
    def of_signal(cls, name: str | None) -> Kind:
        """Return the kind of a stop that was asked for by a signal; None is another rank's."""
        return cls.TIME_LIMIT if name == TIME_LIMIT_SIGNAL else cls.SIGNAL


PREEMPTED = frozenset({Kind.TIME_LIMIT, Kind.SIGNAL, Kind.OUT_OF_MEMORY, Kind.DISK_FULL})
FAILED = frozenset({Kind.DIVERGED, Kind.ERROR, Kind.OUT_OF_MEMORY, Kind.LOST})


def kind_of(event: Mapping[str, Any]) -> Kind | None:
    """Return the kind of a journal's event; None where it neither stops nor fails.

    Preempted events had no kind once, and their reason told it: a signal's name, what ran out of memory, or else what
    the disk said.
    """
    told, is_failure = event.get("kind"), event["event"] == "failed"
    if not is_failure and event["event"] != "preempted":
        return None
    if told in (FAILED if is_failure else PREEMPTED):
        return Kind(told)
    if is_failure:
        return Kind.ERROR
    reason = str(event.get("reason", ""))
    if reason in signal.Signals.__members__ or reason == ANOTHER_RANKS_SIGNAL:
        return Kind.of_signal(reason)
    return Kind.OUT_OF_MEMORY if reason.startswith(OUT_OF_MEMORY) else Kind.DISK_FULL
