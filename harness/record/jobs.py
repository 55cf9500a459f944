"""Jobs as a scheduler sees them, and the error for a scheduler that does not answer."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class JobState(StrEnum):
    """State of a job; the journals of its Runs hold their results."""

    QUEUED = "queued"
    RUNNING = "running"
    ENDED = "ended"
    """Its worker ended by itself."""
    BUSY = "busy"
    """Another process trains the Series."""
    PREEMPTED = "preempted"
    """It was stopped and has saved; it must be submitted again."""
    NO_SPACE = "no_space"
    """Its disk is full; its checkpoints are kept, and it cannot continue until space is freed."""
    OUT_OF_MEMORY = "out_of_memory"
    """The system killed one of its ranks for memory."""
    LOST = "lost"
    """Its process disappeared without a journal event."""


LIVE = frozenset({JobState.QUEUED, JobState.RUNNING})
"""States of a job that is not over."""
ELSEWHERE = "ELSEWHERE"
"""State given to a job of another SLURM cluster, which cannot be asked from here."""
NOT_LOOKED_AT = "SLURM has not looked at it yet"
"""Reason of a waiting job if SLURM gives none."""


class SchedulerUnavailable(RuntimeError):
    """A scheduler does not answer, for the reason given; its jobs may go on."""

    def __init__(self, scheduler: str, why: str, *, is_here: bool = True, may_be_over: bool = False) -> None:
        super().__init__(why)
        self.scheduler = scheduler
        self.is_here = is_here
        """False if this machine has none of the scheduler's programs."""
        self.may_be_over = may_be_over
        """True if the scheduler may have ended for good; then only the journals know what became of its jobs."""


@dataclass(frozen=True)
class JobView:
    """One job, or one element of an array, as its scheduler sees it."""

    job_id: str
    """12, or 12_3 for an array's element."""
    name: str
    state: JobState
    slurm_state: str
    seconds: float
    """Time since it last started."""
    nodes: str
    reason: str | None = None
    """The scheduler's code for why it waits."""
    explained: str | None = None
    """The reason with its meaning and a remedy."""
    accounted_seconds: float | None = None
    """Time it has run over all its starts; None without accounting."""
    packed: bool = False
    """True if it trains several Series, and this one perhaps not now."""
    study: str = ""
    """Study that submitted it, if the Run joined the work of another submission."""

    @property
    def why(self) -> str:
        """Reason why it waits."""
        return self.explained or self.reason or NOT_LOOKED_AT
