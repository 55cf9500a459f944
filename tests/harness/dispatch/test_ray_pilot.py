"""The batch script of a packed job between two Rays; with real ones it is tested on a real SLURM."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from harness.common.process import identify_process
from harness.dispatch.arrays import Array, ArrayBook
from harness.dispatch.base import Task
from harness.dispatch.ray import pilot as ray_job
from harness.dispatch.ray.host import RayDown
from harness.plan.allocation import Shape
from harness.record.control import Control
from harness.record.root import Launch, Root, write_launch, write_run
from harness.train.stopping import EXIT_NO_NODES, EXIT_PREEMPTED
from tests.harness.journals import registered

Fields = dict[str, Any]


@pytest.fixture
def array_file(tmp_path: Path, study_fields: Fields) -> Path:
    """A packed array of one Run that nobody has trained."""
    study_fields["grid"] |= {"iterations": [10]}
    resolved = registered(Root(tmp_path / "runs"), study_fields)
    (point,) = resolved.points
    study_dir = resolved.root.study("tiny").absolute()
    launch = Launch(
        corpus=Path("corpus"), control=study_dir / "control.jsonl", dispatcher="ray", micro_batch=1
    )
    write_launch(resolved.root, point.series_id, launch)
    task = Task(series_id=point.series_id, run_dirs=(write_run(resolved.root, point.run).absolute(),))
    array = Array(
        name="ssmscale-a",
        shape=Shape(nodes=1, ranks=1, threads=1, memory_gib=1),
        tasks=(task,),
        packed=True,
        process=identify_process(),
        t=time.time(),
        job_id="7",
    )
    ArrayBook(study_dir).write(array)
    return study_dir / "arrays" / "ssmscale-a.json"


@pytest.fixture
def handlers() -> Iterator[None]:
    """Signals are heard as before when the test is over."""
    held = {number: signal.getsignal(number) for number in (*ray_job.WAKES, signal.SIGCONT)}
    yield
    for number, handler in held.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
def test_a_job_whose_time_is_over_while_ray_is_being_started_again_starts_none_and_is_requeued(
    array_file: Path, scontrol: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[None] = []

    @contextmanager
    def goes_away(_: ray_job.Pilot) -> Iterator[None]:
        starts.append(None)
        raise RayDown("Ray ended: its head ended")
        yield

    append: Callable[..., None] = Control.append

    def tell_when_it_crashed(self: Control, event: str, **fields: Any) -> None:
        append(self, event, **fields)
        if len(starts) == 1:
            os.kill(os.getpid(), signal.SIGUSR2)  # no step of SLURM's is there that could be told

    monkeypatch.setattr(ray_job.Pilot, "_ray", goes_away)
    monkeypatch.setattr(Control, "append", tell_when_it_crashed)
    assert ray_job.main([str(array_file)]) == EXIT_PREEMPTED
    assert len(starts) == 1
    assert scontrol.read_text().split() == ["7_0"]


@pytest.mark.usefixtures("handlers", "scontrol")
def test_a_ray_that_has_no_node_any_more_is_started_again_and_not_just_its_controller(
    array_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Nodes:
        """Keepers that have seen nothing: a raylet that hangs is there."""

        def listen(self, _: float) -> None: ...

        def check(self) -> None: ...

    starts: list[None] = []

    @contextmanager
    def started(pilot: ray_job.Pilot) -> Iterator[Nodes]:
        starts.append(None)
        pilot.log.parent.mkdir(parents=True, exist_ok=True)
        pilot.log.write_text("Ray has had no node for 360 s\n")
        yield Nodes()

    monkeypatch.setattr(ray_job.Pilot, "_ray", started)
    codes = iter([EXIT_NO_NODES, EXIT_PREEMPTED])
    monkeypatch.setattr(ray_job.Pilot, "_steer", lambda self, nodes: next(codes))
    assert ray_job.main([str(array_file)]) == EXIT_PREEMPTED
    assert len(starts) == 2
    (crash,) = Control(array_file.parent.parent / "control.jsonl").read()
    assert crash["reason"] == "Ray has had no node for 360 s"
