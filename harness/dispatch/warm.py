"""Backends that run tasks themselves, in groups of ranks that stay warm from one task to the next."""

from __future__ import annotations

import itertools
import os
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.dispatch.base import Backend, Handle, SubmitTarget, Task
from harness.record.jobs import JobState, JobView


class WarmBackend(Backend):
    """Queues tasks and feeds them to groups of ranks, all of which end with this process."""

    groups: list[Any]
    """Groups that exist, each with the job it trains in `handle`."""

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
            if (found := self._poll(group)) is not None:
                handle, self.ended[handle] = found
            if group.is_gone:
                self._drop(group)
        if (
            self.waiting and JobState.NO_SPACE not in self.ended.values()
        ):  # on a full disk no task gets further
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
