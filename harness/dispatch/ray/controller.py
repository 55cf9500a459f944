"""Train the Series of a packed array on the Ray cluster at RAY_ADDRESS until none of their Runs is left.

    python -m harness.dispatch.ray.controller ARRAY_FILE DIGEST      with RAY_ADDRESS set

The controller reads all its state from ROOT, so it may be killed and started again at any time, here or in another
allocation: finished Runs stay finished, and others continue from their last checkpoint.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from harness.dispatch.arrays import Array
from harness.dispatch.base import Backend, SubmitTarget, Task, close_work
from harness.dispatch.ray.dispatcher import LOOK_SECONDS, RayDispatcher, connected
from harness.dispatch.ray.host import RayDown
from harness.dispatch.ray.job_server import RayJobs
from harness.dispatch.slurm.settle import run_job
from harness.dispatch.supervise import JobSupervisor
from harness.record.control import Control
from harness.record.jobs import LIVE, SchedulerUnavailable
from harness.record.series import unfinished
from harness.train.part import work_on
from harness.train.stopping import EXIT_NO_NODES, EXIT_PREEMPTED, StopFlag

log = logging.getLogger("ssmscale.ray")

JOIN_SECONDS = 5.0
"""Interval between two looks for Runs that join Series which are over."""
OTHERS_SECONDS = 120.0
"""Time to wait for Series that other processes train once all others have ended: the devices are idle meanwhile."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Train an array's tasks; returns 0 if none is left.

    Otherwise returns 69 if Ray has no nodes, 71 if too few of its nodes are not bad, 74 if the disk is full, 75 if it
    was told to stop.
    """
    stop = StopFlag()
    stop.install()

    def train(array_file: Path, array: Array) -> int:
        study_dir = array_file.parent.parent
        with connected(os.environ["RAY_ADDRESS"]):
            stop.install()  # Ray has installed handlers of its own
            if array.ray_address is not None:  # SLURM itself waits for other jobs
                wait_for_jobs(array.after, stop)
            if all(task.drives_ray for task in array.tasks):
                return drive(array.tasks, stop)
            with RayDispatcher(study_dir, SubmitTarget("ray")) as dispatcher:
                return train_tasks(array, study_dir, dispatcher, stop)

    try:
        return run_job(arguments, train)
    except RayDown as error:
        log.error("%s", error)
        return EXIT_NO_NODES


def wait_for_jobs(names: Sequence[str], stop: StopFlag) -> None:
    """Return when none of these jobs of the Ray at RAY_ADDRESS waits or runs, or when told to stop."""
    while names and not stop.reason:
        try:
            views = RayJobs(os.environ["RAY_ADDRESS"]).views()
        except SchedulerUnavailable as gone:  # as long as this driver lives, the cluster does too
            log.warning("%s", gone)
        else:
            if not any(views[name].state in LIVE for name in names if name in views):
                return
        time.sleep(LOOK_SECONDS)


def train_tasks(array: Array, study_dir: Path, backend: Backend, stop: StopFlag) -> int:
    """Submit the unfinished Runs of each task until none is left, or until told to stop; returns the exit status.

    Raises DiskFull.
    """
    control = Control(study_dir / "control.jsonl")
    supervisor = JobSupervisor(control, backend)
    tasks = _Tasks(array.tasks, control)
    while not stop.reason:
        left = tasks.left(supervisor)
        if not left and supervisor.is_empty:
            if close_work(array.name, array.tasks):
                return 0
            continue  # a Run has joined just now
        if wanted := [task for task in left if supervisor.takes(task.series_id)]:
            supervisor.watch_over(backend.submit(wanted))
        supervisor.watch()
        # A Series of another process seems to be ours for a moment, each time it is submitted and found to be busy.
        if supervisor.is_empty and time.monotonic() - supervisor.trained_at > OTHERS_SECONDS:
            log.info("other processes train the %d series that are left", len(left))
            close_work(array.name, array.tasks, by_force=True)
            return 0
    log.info("told to stop (%s): workers save what they have", stop.reason)
    return EXIT_PREEMPTED


def drive(tasks: Sequence[Task], stop: StopFlag) -> int:
    """Do the work of tasks that drive the whole Ray, in this process; returns the exit status. Raises DiskFull."""
    outcomes = [work_on(task.order, stop) for task in tasks]
    return EXIT_PREEMPTED if "preempted" in outcomes else 0


class _Tasks:
    """The tasks of an array; the journals of finished ones are read again only after control.jsonl has changed.

    Runs that join finished ones are looked for less often.
    """

    def __init__(self, tasks: Sequence[Task], control: Control) -> None:
        self._tasks, self._control = tasks, control
        self._over: set[str] = set()
        self._size = -1
        self._look_again = 0.0

    def left(self, supervisor: JobSupervisor) -> list[Task]:
        """Return tasks for the unfinished Runs of the Series that the supervisor does not have."""
        size = self._control.path.stat().st_size if self._control.path.exists() else 0
        now = time.monotonic()
        if size != self._size:  # a Run may have been retried
            self._over.clear()
            self._size = size
        elif now >= self._look_again or supervisor.is_empty:
            self._over -= {task.series_id for task in self._tasks if task.work().joined()}
            self._look_again = now + JOIN_SECONDS
        tasks = [
            task
            for task in self._tasks
            if task.series_id not in self._over and not supervisor.has(task.series_id)
        ]
        # One call for all: it reads control.jsonl.
        folders = [folder for task in tasks for folder in task.run_dirs]
        unfinished_runs = set(unfinished(folders, self._control)) if folders else set()
        left = []
        for task in tasks:
            if run_dirs := [folder for folder in task.run_dirs if folder in unfinished_runs]:
                left.append(task.rest(run_dirs))
            elif joined := task.work().joined():  # the workers find them by themselves
                left.append(task.rest(joined).model_copy(update={"run_dirs": task.run_dirs}))
            else:
                self._over.add(task.series_id)
        return left


if __name__ == "__main__":
    sys.exit(main())
