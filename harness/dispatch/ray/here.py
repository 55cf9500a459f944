"""Tasks packed on a Ray that is started on this machine for one submission, and ended with it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Self

from harness.common.console import errors
from harness.dispatch.ray.cluster import ray_here
from harness.dispatch.ray.dispatcher import RayDispatcher, connected
from harness.plan.allocation import describe_packing
from harness.plan.cluster import this_machine
from harness.plan.plan import PlannedRun


class RayHere(RayDispatcher):
    """Runs tasks on a Ray of this machine."""

    has_one_machine = True

    def __enter__(self) -> Self:
        """Start the Ray. Raises RayDown if it does not start."""
        with ExitStack() as stack:
            ray = stack.enter_context(ray_here(this_machine(), self.study_dir / "ray"))
            if ray.dashboard is not None:
                errors.print(f"Ray's dashboard: {ray.dashboard} (from another machine: {ray.tunnel()})")
            os.environ |= ray.environment()
            stack.enter_context(connected(ray.address))
            super().__enter__()
            self._ray = stack.pop_all()
        return self

    def describe(self, runs: Sequence[PlannedRun]) -> list[str]:
        """Describe how many Runs are packed."""
        return describe_packing(runs, this_machine(), "a Ray of this machine")

    def close(self) -> None:
        """Have workers save, and end the Ray."""
        with self._ray:
            super().close()
