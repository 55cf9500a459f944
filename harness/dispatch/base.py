"""The protocol of a backend, and the tasks it is given: the same for a laptop, a scheduler and a Ray cluster."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from pydantic import Field

from harness.common.format import NOTHING, Estimate
from harness.plan.cluster import CONFIRM_GPU_HOURS, Cluster, Profile, this_machine
from harness.record.control import Control
from harness.record.jobs import JobState, JobView
from harness.record.registry import ResolvedStudy
from harness.record.root import Root
from harness.record.series import give_up, place, unfinished
from harness.study.run import Count, Frozen, Positive

if TYPE_CHECKING:
    from harness.plan.plan import PlannedRun


class Task(Frozen):
    """What a backend runs: a command line of ours, its resources, its folder, and how its progress is read.

    The one kind there is trains a Series as far as these Runs want it. The fields up to `architecture` are kept in an
    array's file; the others serve the process that submits.
    """

    series_id: str
    run_dirs: tuple[Path, ...]
    ranks: Count = 1
    threads: Count = 1
    """CPU cores of a rank."""
    gpu_fraction: Positive = 1.0
    """Share of a GPU each rank takes; below 1 only where there is one rank."""
    seconds: float = 0.0
    """Seconds of training that are left of it by the plan."""
    architecture: str = ""
    """Architecture it trains: predictions err alike for one architecture."""
    nodes: Count = Field(default=1, exclude=True)
    hours: Estimate = Field(default=NOTHING, exclude=True)
    """Time it takes by the plan, its start included."""
    label: str = Field(default="", exclude=True)
    """Size and architecture, as a user knows it."""

    @property
    def command(self) -> list[str]:
        """Command line of each of its ranks."""
        return [sys.executable, "-u", "-m", "harness.train.worker", *map(str, self.run_dirs)]

    @property
    def root(self) -> Root:
        """ROOT of its Runs."""
        return Root(self.run_dirs[0].parent.parent)

    @property
    def folder(self) -> Path:
        """Folder of its journal and of its ranks' logs."""
        return self.root.series(self.series_id)

    @property
    def rank_logs(self) -> list[Path]:
        """Logs that its ranks write, one file a rank."""
        return [self.folder / "logs" / f"rank-{rank}.log" for rank in range(self.ranks)]

    def left(self, control: Control) -> list[Path]:
        """Return the directories of its Runs that are neither over nor cancelled."""
        return unfinished(self.run_dirs, control)

    def place(self) -> str:
        """Return where it stands, as far as it would be resumed from."""
        return place(self.root, self.series_id, self.run_dirs)

    def give_up(self, left: Sequence[Path], reason: str) -> None:
        """Write into the journals of these Runs of it that they are lost."""
        give_up(self.root, self.series_id, left, reason)


@dataclass(frozen=True)
class Handle:
    """A task that was submitted, or may have been."""

    task: Task
    job_id: str
    """The backend's id of the job that runs it; empty where it is not known to have been submitted."""
    batch: str = ""
    """Name of the batch it was submitted in."""
    t: float = 0.0
    """When it was submitted, seconds since 1970."""
    allocation: str = ""
    """Resources of the one job that runs the whole batch, in words."""

    def view(self, state: JobState) -> JobView:
        """Return the view of its job, which is in this state, of a backend that knows no more of it."""
        return JobView(self.job_id, self.batch, state, "", 0.0, "")


@dataclass(frozen=True)
class SubmitTarget:
    """Where Runs are trained, and how."""

    on: str
    """A backend's name for the user: local, slurm (each Series a job), ray (packed into one job); or auto (each Series
    as it needs)."""
    profile: Profile | None = None
    """The cluster; None for this machine."""
    cluster: str | None = None
    """The user's name for the cluster."""
    nodes: int | None = None
    """Nodes Series are packed on, where the user says it."""
    ray_address: str | None = None
    """A Ray cluster that is there already, on which Series are packed."""


@dataclass(frozen=True)
class Dashboard:
    """The page of a packed job that runs."""

    page: str | None
    tunnel: str | None
    """Command by which the page is seen on another machine."""
    token_file: Path


class Backend(ABC):
    """Runs tasks. Four methods make a backend; the others have answers that do for most.

    Every method that asks a scheduler raises SchedulerUnavailable where that does not answer. Runs are cancelled in
    control.jsonl, which workers read; results are in journals and never travel through a backend.
    """

    name: str
    """Its name in journals and in control.jsonl."""
    scheduler: str = ""
    """Name of the scheduler in messages."""
    outlives: bool = False
    """True if tasks go on when the process that submitted them has ended, and are found again by the ledger."""
    is_packed: bool = False
    """True if one job runs all tasks of a batch."""
    target: SubmitTarget
    study_dir: Path

    def __init__(self, study_dir: Path, target: SubmitTarget, jobs: int | None = None) -> None:
        """Open it for a study; it is to run at most `jobs` tasks at once where it supervises them here."""
        self.study_dir, self.target, self.jobs = study_dir.absolute(), target, jobs

    def __enter__(self) -> Self:
        """Make ready what must be there before anything is leased for it."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        """Close it."""
        self.close()

    @property
    def where(self) -> str:
        """Place it submits to, as a user knows it."""
        return self.name if self.target.profile is None else self.target.profile.name

    @property
    def confirm_gpu_hours(self) -> float:
        """GPU-hours beyond which the user is asked before they are submitted."""
        return CONFIRM_GPU_HOURS if self.target.profile is None else self.target.profile.confirm_gpu_hours

    def check(self, resolved: ResolvedStudy) -> None:
        """Raise InputError where it cannot train this study."""
        return

    def offer(self, resolved: ResolvedStudy) -> Cluster:
        """Return the machine or cluster to plan for; raises InputError where there is none that sees the study."""
        return this_machine()

    def describe(self, runs: Sequence[PlannedRun]) -> list[str]:
        """Say how planned Runs would be submitted; raises InputError where a Series has no room."""
        return []

    def room(self, tasks: int) -> int:
        """Return how many of so many tasks may be submitted now."""
        return tasks

    def batches(self, tasks: Sequence[Task]) -> list[list[Task]]:
        """Divide tasks into batches, each submitted by one call."""
        return [list(tasks)]

    @abstractmethod
    def submit(self, tasks: Sequence[Task], name: str = "") -> list[Handle]:
        """Submit a batch in the order in which its tasks should begin, under a name by which it is found again."""

    @abstractmethod
    def views(self, handles: Sequence[Handle]) -> Mapping[str, JobView]:
        """Return the scheduler's view of the jobs of these handles' batches, by job id."""

    @abstractmethod
    def cancel(self, handles: Sequence[Handle]) -> None:
        """End the jobs of these handles, which save first; those that are over do not matter."""

    @abstractmethod
    def logs(self, handle: Handle) -> list[Path]:
        """Return the logs of a job beside those of its ranks, whether they exist or not."""

    def close(self) -> None:
        """Stop what ends with this process, saving what it has."""
        return

    def cluster_name(self) -> str | None:
        """Return the scheduler's name of the cluster it submits to; what another cluster was given is not asked for."""
        return None

    def dashboard(self, batch: str) -> Dashboard | None:
        """Return the page of a packed job that runs."""
        return None
