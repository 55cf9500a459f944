"""Train the Series of a packed array on the Ray cluster this process finds, until nothing of them is left.

    python -m harness.dispatch.ray.controller ARRAY_FILE      with RAY_ADDRESS set

All it knows it reads from ROOT, so it may be killed and started again at any time, here or in another allocation: what
has finished stays finished, and what has not goes on from its last checkpoint.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from harness.common.disk import DiskFull
from harness.common.process import log_to_stderr
from harness.dispatch.arrays import Array
from harness.dispatch.base import Backend, Task
from harness.dispatch.ray.dispatcher import RayDispatcher, connected
from harness.dispatch.ray.host import RayDown
from harness.dispatch.supervise import JobSupervisor
from harness.record.control import Control
from harness.record.journal import read_progress
from harness.record.root import Root, read_model, read_run
from harness.record.series import unfinished
from harness.train.stopping import EXIT_NO_NODES, EXIT_NO_SPACE, EXIT_PREEMPTED, StopFlag
from ssmttm.errors import InputError

log = logging.getLogger("ssmscale.ray")

OTHERS_SECONDS = 120.0
"""How long Series that other processes train are waited for once nothing else is left: devices stand idle meanwhile."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Train an array's tasks; returns 0 where nothing is left.

    Else 69 where there are no nodes, 74 where the disk is full, 75 where it was stopped.
    """
    log_to_stderr()
    (array_file,) = arguments if arguments is not None else sys.argv[1:]
    stop = StopFlag()
    stop.install()
    try:
        array = read_model(Path(array_file), Array)
        study_dir = Path(array_file).absolute().parent.parent
        with connected(os.environ["RAY_ADDRESS"]):
            stop.install()  # Ray has its own idea of what to do when it is told to stop
            dispatcher = RayDispatcher(study_dir / "logs")
            try:
                return train_tasks(array, study_dir, dispatcher, stop)
            finally:
                dispatcher.close()
    except InputError as error:
        log.error("%s", error)
        return 2
    except RayDown as error:
        log.error("%s", error)
        return EXIT_NO_NODES
    except DiskFull as error:
        log.error("%s; %s", error, error.remedy)
        return EXIT_NO_SPACE


def train_tasks(array: Array, study_dir: Path, dispatcher: Backend, stop: StopFlag) -> int:
    """Hand over what is left of each task until nothing is, or until told to stop; returns the exit status.

    Raises DiskFull.
    """
    root = Root(study_dir.parent.parent)
    control = Control(study_dir / "control.jsonl")
    in_hand = JobSupervisor(control, dispatcher)
    tasks = _Tasks(array.tasks, root, control)
    while not stop.reason:
        left = tasks.left(in_hand)
        if not left and in_hand.is_empty:
            return 0
        if wanted := [job for job in left if in_hand.takes(job.series_id)]:
            in_hand.watch_over(dispatcher.submit(wanted))
        in_hand.watch()
        # To be told that a Series is in other hands takes a moment each time, in which it seems to be in these.
        if in_hand.is_empty and time.monotonic() - in_hand.trained_at > OTHERS_SECONDS:
            log.info("other processes train the %d series that are left", len(left))
            return 0
    log.info("told to stop (%s): workers save what they have", stop.reason)
    return EXIT_PREEMPTED


class _Tasks:
    """The tasks of an array and what is left of them; journals of what is over are not read again in vain."""

    def __init__(self, tasks: Sequence[Task], root: Root, control: Control) -> None:
        self._tasks, self._root, self._control = tasks, root, control
        self._over: set[str] = set()
        self._known = -1

    def left(self, in_hand: JobSupervisor) -> list[Task]:
        """Series that are not in hand and not over."""
        told = self._control.path.stat().st_size if self._control.path.exists() else 0
        if told != self._known:  # something may have been forgiven
            self._over.clear()
            self._known = told
        tasks = [
            task
            for task in self._tasks
            if task.series_id not in self._over and not in_hand.has(task.series_id)
        ]
        # Of all at once: control.jsonl is read each time.
        left = (
            set(unfinished([folder for task in tasks for folder in task.run_dirs], self._control))
            if tasks
            else set()
        )
        jobs = []
        for task in tasks:
            if run_dirs := [folder for folder in task.run_dirs if folder in left]:
                jobs.append(self._rest(task, run_dirs))
            else:
                self._over.add(task.series_id)
        return jobs

    def _rest(self, task: Task, run_dirs: Sequence[Path]) -> Task:
        steps = max(read_run(run_dir).iterations for run_dir in run_dirs)
        done = min(read_progress(self._root.series(task.series_id)).step, steps)
        seconds = task.seconds * (1 - done / steps)
        return task.model_copy(update={"run_dirs": tuple(run_dirs), "seconds": seconds})


if __name__ == "__main__":
    sys.exit(main())
