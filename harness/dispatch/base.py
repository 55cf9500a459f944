"""What every dispatcher is: four verbs over jobs, the same for a laptop and for a cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

EXIT_NO_NODES = 69
"""EX_UNAVAILABLE: the exit status of what trains on a Ray that has had no node for long; another Ray may have."""
EXIT_NO_SPACE = 74
"""EX_IOERR: a worker's exit status where no room is left on the disk; everything saved before is kept."""
EXIT_PREEMPTED = 75
"""EX_TEMPFAIL: stopped at a step boundary with everything saved, or busy elsewhere: to be started again."""
GPU_SHARE = "SSMSCALE_GPU_SHARE"
"""Variable with the share of a GPU that a rank has; not set where it has all of it."""
MOST_ATTEMPTS = 3
"""Times a Series whose worker goes away without a word is started again before it counts as failed."""


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


@dataclass(frozen=True)
class Job:
    """One Series to be trained, as far as these Runs want it."""

    series_id: str
    run_dirs: tuple[Path, ...]
    nodes: int
    ranks: int
    threads: int
    log_dir: Path
    gpu_fraction: float = 1.0
    """Share of a GPU each rank takes; below 1 only where there is one rank."""
    seconds: float = 0.0
    """What is left of it by the plan: seconds from its first step to its last."""
    architecture: str = ""
    """What it trains: predictions err alike for one architecture."""


@dataclass(frozen=True)
class Handle:
    """A submitted job."""

    job: Job
    job_id: str


class Dispatcher(Protocol):
    """Starts workers and watches them; that Runs are cancelled its workers find in control.jsonl."""

    def submit(self, jobs: Sequence[Job]) -> list[Handle]:
        """Hand over jobs in the order in which they should begin."""

    def poll(self, handles: Sequence[Handle]) -> Mapping[Handle, JobState]:
        """Where each job is now."""

    def log_paths(self, handle: Handle) -> list[Path]:
        """Where a job's output goes, a file a rank."""

    def close(self) -> None:
        """Stop everything that still runs, saving what it has, and let go of all processes."""
