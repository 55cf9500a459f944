"""A backend in one class and one registration, through the verbs as a user calls them."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from harness.dispatch import registry
from harness.dispatch.arrays import Array, ArrayStore, new_array
from harness.dispatch.base import Backend, Handle, Task
from harness.plan.allocation import Shape
from harness.record.jobs import JobState, JobView
from harness.record.root import Root
from tests.conftest import Answer, Command, Write
from tests.studies import Fields
from tests.waiting import wait_until


class Toy(Backend):
    """A scheduler that keeps jobs until it is opened, and then runs each in a process of its own."""

    name, scheduler, outlives = "toy", "Toy", True
    is_open = False
    waiting: dict[str, Task] = {}
    started: dict[str, subprocess.Popen[bytes]] = {}

    def submit(self, tasks: Sequence[Task], name: str = "") -> list[Handle]:
        shape = Shape(nodes=1, ranks=1, threads=1, memory_gib=1)
        return ArrayStore(self.study_dir).submit(new_array(name, shape, tasks, backend="toy"), self._take)

    def _take(self, array: Array) -> str:
        number = str(len(self.waiting) + len(self.started))
        self.waiting |= {f"{number}_{index}": task for index, task in enumerate(array.tasks)}
        return number

    def views(self, handles: Sequence[Handle]) -> Mapping[str, JobView]:
        for job_id in list(self.waiting) if self.is_open else ():
            with (self.study_dir / f"toy-{job_id}.log").open("wb") as log:
                log.write(b"the toy starts it\n")
                log.flush()
                self.started[job_id] = subprocess.Popen(
                    self.waiting.pop(job_id).command, stdout=log, stderr=log
                )
        states = dict.fromkeys(self.waiting, JobState.QUEUED) | {
            job_id: JobState.RUNNING if process.poll() is None else JobState.ENDED
            for job_id, process in self.started.items()
        }
        return {handle.job_id: handle.view(states.get(handle.job_id, JobState.ENDED)) for handle in handles}

    def cancel(self, handles: Sequence[Handle]) -> None:
        for handle in handles:
            self.waiting.pop(handle.job_id, None)
            if handle.job_id in self.started:
                self.started[handle.job_id].terminate()

    def logs(self, handle: Handle) -> list[Path]:
        return [self.study_dir / f"toy-{handle.job_id}.log"]


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Toy]]:
    """Register the backend, and end what it runs."""
    monkeypatch.setitem(registry.BACKENDS, "toy", f"{__name__}:Toy")
    for name, value in (("is_open", False), ("waiting", {}), ("started", {})):
        monkeypatch.setattr(Toy, name, value)
    monkeypatch.delenv("SSMSCALE_CLUSTER", raising=False)
    yield Toy
    for process in Toy.started.values():
        process.kill()
        process.wait()


def test_a_backend_of_one_class_is_submitted_to_shown_cancelled_retried_and_its_logs_are_printed(
    tmp_path: Path,
    toy: type[Toy],
    study_fields: Fields,
    write_study: Write,
    ssmscale: Command,
) -> None:
    root = Root(tmp_path / "runs")

    def ask(verb: str, *options: str) -> Answer:
        said = ssmscale(verb, *options, "--root", str(root.path))
        assert said.status == 0, said.err
        return said

    study = str(write_study(study_fields))
    assert "2 runs in 1 series submitted to toy: Toy jobs 0" in ask("submit", study, "--on", "toy").out
    assert "nothing of tiny is left to submit" in ask("submit", study, "--on", "toy").out
    assert "2 queued" in ask("status", "tiny").out
    assert "1 job taken from Toy: 0_0" in ask("cancel", "tiny").out
    assert "2 cancelled" in ask("status", "tiny").out

    toy.is_open = True
    assert "2 runs in 1 series submitted to toy: Toy jobs" in ask("retry", "tiny").out
    wait_until(lambda: "2 done" in ask("status", "tiny").out)
    (run, *_) = (path.name for path in (root.path / "runs").iterdir())
    said = ask("logs", "tiny", run).out
    assert "Toy's log of job" in said
    assert "the toy starts it" in said
    (array, *_) = ArrayStore(root.study("tiny")).read().values()
    assert array.backend_name == "toy"
