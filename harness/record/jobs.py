"""Jobs as a scheduler sees them: their states, and the one error for a scheduler that does not answer."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class JobState(StrEnum):
    """Where a job is with its dispatcher; what its Runs achieved is in their journals."""

    QUEUED = "queued"
    RUNNING = "running"
    ENDED = "ended"
    """Its worker came back; the journals tell the rest."""
    BUSY = "busy"
    """Another process is training the Series."""
    PREEMPTED = "preempted"
    """It was told to stop and has saved; to be submitted again."""
    NO_SPACE = "no_space"
    """No room was left on its disk; what it had saved is kept, and nothing helps until there is room."""
    LOST = "lost"
    """Its process went away without a word."""


LIVE = frozenset({JobState.QUEUED, JobState.RUNNING})
"""States of a job that is not over."""


ELSEWHERE = "ELSEWHERE"
"""Our word for the state of a job of another SLURM cluster, which is not asked from here."""


NOT_LOOKED_AT = "SLURM has not looked at it yet"
"""Why a job waits for which SLURM gives no reason."""


class SchedulerUnavailable(RuntimeError):
    """A scheduler does not answer; the sentence says why, and nothing about its jobs."""

    def __init__(self, scheduler: str, why: str, *, is_here: bool = True, may_be_over: bool = False) -> None:
        super().__init__(why)
        self.scheduler = scheduler
        """Name of the scheduler."""
        self.is_here = is_here
        """False if this machine has none of the scheduler's programs."""
        self.may_be_over = may_be_over
        """True if it may have ended for good; the journals then tell what became of its jobs."""


@dataclass(frozen=True)
class JobView:
    """One job, or one element of an array, as its scheduler sees it."""

    job_id: str
    """12, or 12_3 for an array's element."""
    name: str
    state: JobState
    slurm_state: str
    seconds: float
    """Time it has run since it last started."""
    nodes: str
    reason: str | None = None
    """Why it waits, in the scheduler's word for it."""
    explained: str | None = None
    """The reason with its meaning and what helps."""
    accounted_seconds: float | None = None
    """Time it has run in all, every start counted; None without accounting."""
    packed: bool = False
    """Whether it trains other Series too: that it runs does not say that it trains this one now."""

    @property
    def why(self) -> str:
        """Why it waits, in words."""
        return self.explained or self.reason or NOT_LOOKED_AT
