"""The protocol of a backend and the tasks it runs: the same for a laptop, a scheduler and a Ray cluster.

Backends whose ranks are children of this process, or actors that end with it, share WarmBackend.
"""

from __future__ import annotations

import itertools
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from pydantic import ConfigDict, Field, JsonValue

from harness.common.disk import DISK_THREADS, side_by_side
from harness.common.format import Estimate
from harness.common.process import interpreter
from harness.plan.cluster import CONFIRM_GPU_HOURS, Cluster, Profile, this_machine
from harness.record.control import Control
from harness.record.jobs import JobState, JobView
from harness.record.journal import read_progress
from harness.record.root import Launch, Root, read_launch, read_run
from harness.record.series import JoinRequest, WorkList, give_up, note_stall, place
from harness.study.run import Count, Frozen, Positive
from ssmttm.errors import InputError

if TYPE_CHECKING:
    from harness.plan.plan import PlannedRun


class Work(Protocol):
    """The work list of a task."""

    def requests(self, *, ended: bool = False) -> list[JoinRequest]:
        """Return the Runs that joined."""

    def joined(self) -> list[Path]:
        """Return the directories of the Runs that joined and are neither over nor cancelled."""

    def left(self) -> list[Path]:
        """Return the directories, given or joined, that are neither over nor cancelled."""

    def run_dirs(self) -> list[Path]:
        """Return the directories of all Runs, given or joined."""

    def close(self, array: str, *, by_force: bool = False, is_over: bool = True) -> bool:
        """End the work of an array; False, and no change, if Runs that joined are left, unless `by_force`."""


class Task(Frozen):
    """A unit of work for a backend: it trains a Series for some of its Runs.

    harness.dispatch.part has tasks of another kind.

    An array's file keeps the fields up to `seconds`; the others serve the process that submits. Fields that array
    files had in former versions are ignored.
    """

    model_config = ConfigDict(extra="ignore")

    series_id: str
    run_dirs: tuple[Path, ...]
    ranks: Count = 1
    threads: Count = 1
    """CPU cores of a rank."""
    gpu_fraction: Positive = 1.0
    """Share of a GPU that each rank takes; below 1 only for tasks of one rank."""
    seconds: float = 0.0
    """Seconds of training left, as planned."""
    host_gib: float = Field(default=0.0, exclude=True)
    """Host memory of each rank beside a GPU, GiB."""
    nodes: Count = Field(default=1, exclude=True)
    hours: Estimate = Field(default=Estimate(), exclude=True)
    """Planned time, including the start."""
    on_gpu: bool = Field(default=True, exclude=True)
    """True if it computes on GPUs where there are any, else on cores alone."""
    drives_ray: bool = Field(default=False, exclude=True)
    """True if its work is a driver of a whole Ray of `ranks` devices, and no rank on a device of one."""
    label: str = Field(default="", exclude=True)
    """Size and architecture, for messages."""
    after: tuple[str, ...] = Field(default=(), exclude=True)
    """Jobs that must be over, however they end, before it begins: numbers in SLURM, or names in Ray."""

    @property
    def title(self) -> str:
        """Name in messages and logs."""
        return f"series {self.series_id}"

    @property
    def order(self) -> JsonValue:
        """Order that a worker understands: the directories of the Runs."""
        return [str(folder) for folder in self.run_dirs]

    @property
    def command(self) -> list[str]:
        """Command line of each rank."""
        ranks = ("--ranks", str(self.ranks))
        return interpreter("-u", "-m", "harness.train.worker", *ranks, *map(str, self.run_dirs))

    @property
    def root(self) -> Root:
        """ROOT of its Runs."""
        return Root(self.run_dirs[0].parent.parent)

    @property
    def paths(self) -> list[Path]:
        """Paths that it reads and writes, ROOT first: a container must show them."""
        try:
            launch = read_launch(self.root, self.series_id)
        except InputError:  # its worker says so
            return [self.root.path]
        encoder = [] if launch.text_encoder is None else [Path(launch.text_encoder)]
        return [self.root.path, launch.corpus, *(path for path in encoder if path.is_absolute())]

    @property
    def folder(self) -> Path:
        """Folder of the Series: its journal and its ranks' logs."""
        return self.root.series(self.series_id)

    def control_of(self, jobs_dir: Path) -> Control:
        """Return the control.jsonl of the study that launched its Series; `jobs_dir` holds its array."""
        return Control(read_launch(self.root, self.series_id).control)

    def work(self, control: Control | None = None) -> Work:
        """Return the work list of the Series, to which Runs of other studies are added."""
        return WorkList(self.root, self.series_id, [folder.name for folder in self.run_dirs], control)

    def left(self, control: Control) -> list[Path]:
        """Return the directories of the Runs, its own and those that joined, that are neither over nor cancelled."""
        return self.work(control).left()

    def place(self) -> str:
        """Describe the checkpoints from which training would resume."""
        return place(self.root, self.series_id, self.work().run_dirs())

    def rest(self, run_dirs: Sequence[Path]) -> Task:
        """Return a task for these of its Runs, with the seconds that are left of it."""
        steps = max(read_run(run_dir).iterations for run_dir in run_dirs)
        done = min(read_progress(self.folder).step, steps)
        seconds = self.seconds * (1 - done / steps)
        return self.model_copy(update={"run_dirs": tuple(run_dirs), "seconds": seconds})

    @property
    def has_micro_batch(self) -> bool:
        """True if it can begin again with a smaller micro-batch."""
        return True

    @property
    def stall_seconds(self) -> float:
        """Shortest time without a move after which its ranks count as stalled."""
        try:
            return read_launch(self.root, self.series_id).stall_seconds
        except InputError:  # its worker says so
            return float(Launch.model_fields["stall_seconds"].default)

    def note_stall(self, reason: str) -> None:
        """Record in the open journals that its ranks stalled and were ended."""
        note_stall(self.root, self.series_id, self.work().run_dirs(), reason)

    def give_up(self, left: Sequence[Path], reason: str) -> None:
        """Record in the journals of these Runs that they are lost."""
        give_up(self.root, self.series_id, left, reason)


def close_work(array: str, tasks: Sequence[Task], *, by_force: bool = False, is_over: bool = True) -> bool:
    """End the work of an array on the Series of these tasks, as `WorkList.close` does; False if it goes on."""
    lists = [task.work() for task in tasks]
    if not by_force and any(work.joined() for work in lists):
        return False
    return all(
        side_by_side(lambda work: work.close(array, by_force=by_force, is_over=is_over), lists, DISK_THREADS)
    )


@dataclass(frozen=True)
class Handle:
    """A submitted task; its job may not be known yet."""

    task: Task
    job_id: str
    """The backend's id of the job that runs it; empty until the job is known."""
    batch: str = ""
    """Name of the batch it was submitted in."""
    t: float = 0.0
    """Time of submission, seconds since 1970."""
    allocation: str = ""
    """Description of the resources of a packed batch's job."""

    def view(self, state: JobState) -> JobView:
        """Return a view of its job that holds nothing but its state."""
        return JobView(self.job_id, self.batch, state, "", 0.0, "")


@dataclass(frozen=True)
class SubmitTarget:
    """The place where Runs are trained."""

    on: str
    """Backend as the user names it: local, slurm (a job for each Series), ray (all packed into one job), or auto (a job
    for each large Series, the others packed)."""
    profile: Profile | None = None
    """The cluster; None for this machine."""
    cluster: str | None = None
    """The user's name for the cluster."""
    nodes: int | None = None
    """Number of nodes to pack Series on; None to choose it by the plan."""
    ray_address: str | None = None
    """Address of an existing Ray cluster to pack Series on."""


@dataclass(frozen=True)
class Dashboard:
    """The dashboard of a running packed job."""

    page: str | None
    tunnel: str | None
    """Command that makes the page reachable from another machine."""
    token_file: Path


class Backend(ABC):
    """Runs tasks. A backend needs four methods; the defaults of the others suit most backends.

    Every method that asks a scheduler raises SchedulerUnavailable if it does not answer. Runs are cancelled through
    control.jsonl, which workers read; results are in journals and never pass through a backend.
    """

    name: str
    """Name in journals and in control.jsonl."""
    scheduler: str = ""
    """Name of the scheduler in messages."""
    outlives: bool = False
    """True if tasks continue after the submitting process has ended, and the ledger finds them again."""
    is_packed: bool = False
    """True if one job runs all tasks of a batch."""

    def __init__(self, study_dir: Path, target: SubmitTarget, jobs: int | None = None) -> None:
        """Open the backend for a study; a backend that runs tasks here runs at most `jobs` at once."""
        self.study_dir, self.target, self.jobs = study_dir.absolute(), target, jobs

    def __enter__(self) -> Self:
        """Prepare the backend before any Series is leased for it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    @property
    def where(self) -> str:
        """Name of its machine or cluster in messages."""
        return self.name if self.target.profile is None else self.target.profile.name

    @property
    def confirm_gpu_hours(self) -> float:
        """GPU-hours beyond which a submission needs the user's confirmation."""
        return CONFIRM_GPU_HOURS if self.target.profile is None else self.target.profile.confirm_gpu_hours

    def check(self, places: Mapping[str, Path]) -> None:
        """Raise InputError if its tasks cannot work with these paths; each is named as the user gave it."""
        return

    def offer(self, places: Mapping[str, Path]) -> Cluster:
        """Return the machine or cluster to plan for; raises InputError if its tasks cannot reach these paths.

        Tasks write below the first path.
        """
        return this_machine()

    def describe(self, runs: Sequence[PlannedRun]) -> list[str]:
        """Describe how planned Runs would be submitted; raises InputError if a Series does not fit."""
        return []

    def count_at_once(self, series: int) -> int | None:
        """Return how many of this number of Series may train at once; None for as many as fit on a node."""
        return None

    def count_admitted(self, tasks: int) -> int:
        """Return how many of this number of tasks may be submitted now."""
        return tasks

    def batches(self, tasks: Sequence[Task]) -> list[list[Task]]:
        """Divide tasks into batches, one for each call of `submit`."""
        return [list(tasks)]

    @abstractmethod
    def submit(self, tasks: Sequence[Task], name: str = "") -> list[Handle]:
        """Submit a batch under a name by which the ledger finds it; its tasks should begin in this order."""

    @abstractmethod
    def views(self, handles: Sequence[Handle]) -> Mapping[str, JobView]:
        """Return the scheduler's view of the jobs of these handles' batches, by job id."""

    @abstractmethod
    def cancel(self, handles: Sequence[Handle]) -> None:
        """End the jobs of these handles after their workers have saved; ignore jobs that are over."""

    @abstractmethod
    def logs(self, handle: Handle) -> list[Path]:
        """Return the paths of a job's own logs, which need not exist; its ranks' logs are not among them."""

    def close(self) -> None:
        """Stop the tasks that end with this process, after they have saved."""
        return

    def cluster_name(self) -> str | None:
        """Return the scheduler's name of this cluster; the ledger does not ask here for jobs of other clusters."""
        return None

    def dashboard(self, batch: str) -> Dashboard | None:
        """Return the dashboard of a running packed job."""
        return None


class WarmBackend(Backend):
    """Queues tasks for groups of ranks, which stay warm from one task to the next and end with this process."""

    groups: list[Any]
    """Groups that exist, each with the job it trains in `handle`; `stall` describes a stall for which it was ended."""

    def __init__(self, study_dir: Path, target: SubmitTarget, jobs: int | None = None) -> None:
        super().__init__(study_dir, target, jobs)
        self.log_dir = self.study_dir / "logs"
        self.waiting: dict[str, Handle] = {}
        """Jobs that no group has trained yet, by id, in the order of their submission."""
        self.ended: dict[Handle, JobState] = {}
        self._numbers = itertools.count(1)

    def submit(self, tasks: Sequence[Task], name: str = "") -> list[Handle]:
        """Queue tasks."""
        handles = [Handle(task, f"{self.name}-{os.getpid()}-{next(self._numbers)}", name) for task in tasks]
        self.waiting |= {handle.job_id: handle for handle in handles}
        return handles

    def views(self, handles: Sequence[Handle]) -> Mapping[str, JobView]:
        """Read the ranks' replies, start tasks that fit, and return the state of each job."""
        for group in list(self.groups):
            found = self._poll(group)
            if group.is_gone:
                self._drop(group)
            if found is not None:
                handle, state = found
                self.ended[handle] = state
                if group.stall is not None and state is JobState.LOST:
                    handle.task.note_stall(group.stall)
        is_full = JobState.NO_SPACE in self.ended.values()
        if self.waiting and not is_full:  # on a full disk no task gets further
            self._start_waiting()
        states = dict.fromkeys(self.waiting.values(), JobState.QUEUED) | self.ended
        return {handle.job_id: handle.view(states.get(handle, JobState.RUNNING)) for handle in handles}

    def cancel(self, handles: Sequence[Handle]) -> None:
        """Do nothing: workers read control.jsonl at each step, leave the Run and stay warm for the next."""

    def _poll(self, group: Any) -> tuple[Handle, JobState] | None:
        """Return the job of a group that ended since the last call, with its state."""
        found: tuple[Handle, JobState] | None = group.poll()
        return found

    def _drop(self, group: Any) -> None:
        """Take a group that is gone from the list."""
        self.groups.remove(group)

    @abstractmethod
    def _start_waiting(self) -> None:
        """Feed waiting tasks to groups, and start groups for those that fit."""
