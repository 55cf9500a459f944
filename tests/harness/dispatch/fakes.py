"""A backend that runs nothing: a test says in which state each of its jobs is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from harness.dispatch.base import Backend, Handle, SubmitTarget, Task
from harness.plan.allocation import Shape
from harness.record.jobs import JobState, JobView

SMALL = Shape(nodes=1, ranks=1, threads=1, memory_gib=1)


class FakeBackend(Backend):
    """Gives each job the state that a function returns for its handle whenever it is asked."""

    name = "fake"

    def __init__(self, study_dir: Path, state_of: Callable[[Handle], JobState]) -> None:
        super().__init__(study_dir, SubmitTarget("fake"))
        self.state_of = state_of
        self.count = 0

    def submit(self, tasks: Sequence[Task], name: str = "") -> list[Handle]:
        self.count += len(tasks)
        return [Handle(task, f"{self.count}-{index}") for index, task in enumerate(tasks)]

    def views(self, handles: Sequence[Handle]) -> Mapping[str, JobView]:
        return {handle.job_id: handle.view(self.state_of(handle)) for handle in handles}

    def cancel(self, handles: Sequence[Handle]) -> None:
        raise AssertionError(handles)

    def logs(self, handle: Handle) -> list[Path]:
        return []
