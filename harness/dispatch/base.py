"""What every dispatcher is: four verbs over jobs, the same for a laptop and for a cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from harness.record.jobs import JobState


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
