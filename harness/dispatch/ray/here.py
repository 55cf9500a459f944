"""Tasks packed on a Ray that is started on this machine for one submission, and ended with it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from harness.common.console import errors
from harness.dispatch.base import Backend, Handle, Task
from harness.dispatch.ray.cluster import ray_here
from harness.dispatch.ray.dispatcher import RayDispatcher, connected
from harness.plan.allocation import describe_packing
from harness.plan.cluster import this_machine
from harness.plan.plan import PlannedRun
from harness.record.jobs import JobView


class RayHere(Backend):
    """Runs tasks on a Ray of this machine's own."""

    name = "ray"

    def __enter__(self) -> Self:
        """Start the Ray. Raises RayDown where it does not start."""
        self._stack = ExitStack()
        with ExitStack() as stack:
            ray = stack.enter_context(ray_here(this_machine(), self.study_dir / "ray"))
            if ray.dashboard is not None:
                errors.print(f"Ray's dashboard: {ray.dashboard} (from elsewhere: {ray.tunnel()})")
            os.environ |= ray.environment()
            stack.enter_context(connected(ray.address))
            self._ray = RayDispatcher(self.study_dir / "logs", self.jobs)
            stack.callback(self._ray.close)
            self._stack = stack.pop_all()
        return self

    def describe(self, runs: Sequence[PlannedRun]) -> list[str]:
        """Say how many Runs are packed."""
        return describe_packing(runs, this_machine(), "a Ray of this machine's own")

    def submit(self, tasks: Sequence[Task], name: str = "") -> list[Handle]:
        """Hand tasks to the Ray."""
        return self._ray.submit(tasks, name)

    def views(self, handles: Sequence[Handle]) -> Mapping[str, JobView]:
        """Start what there is room for, and return where each task is."""
        return self._ray.views(handles)

    def cancel(self, handles: Sequence[Handle]) -> None:
        """Do nothing: workers read control.jsonl at each step."""

    def logs(self, handle: Handle) -> list[Path]:
        """Return the logs of the workers between tasks."""
        return self._ray.logs(handle)

    def close(self) -> None:
        """Have workers save, and end the Ray."""
        self._stack.close()
