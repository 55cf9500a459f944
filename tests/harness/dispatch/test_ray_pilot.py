"""The batch script of a packed job, when its controller or its Ray ends; tests/cluster runs it with real ones."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from harness.dispatch.arrays import ArrayStore, new_array
from harness.dispatch.base import Task
from harness.dispatch.ray import pilot as pilot_module
from harness.dispatch.ray.cluster import NodeEvent, NodePlan, RayNodes
from harness.dispatch.ray.host import RayDown
from harness.dispatch.ray.pilot import Pilot
from harness.plan.allocation import Shape
from harness.record.control import Control
from harness.record.journal import Event, read_progress
from harness.record.root import Root, read_run, write_run
from harness.record.series import untrained
from harness.train.stopping import EXIT_NO_NODES, EXIT_NO_SPACE, EXIT_PREEMPTED, STOP_SIGNALS
from tests.harness.journals import begin_run, finish, registered
from tests.studies import Fields
from tests.waiting import wait_until


@pytest.fixture
def pilot(scontrol: Path, tmp_path: Path, study_fields: Fields) -> Pilot:
    """The only job of a packed array, none of whose Runs has begun."""
    study_fields["grid"]["seeds"] = [0, 1]
    root = Root(tmp_path / "runs")
    study = registered(root, study_fields)
    series: dict[str, list[Path]] = {}
    for point in study.points:
        series.setdefault(point.series_id, []).append(write_run(root, point.run).absolute())
    tasks = [Task(series_id=key, run_dirs=tuple(folders)) for key, folders in series.items()]
    shape = Shape(nodes=1, ranks=2, threads=1, memory_gib=1)
    array = new_array("ssmscale-packed", shape, tasks, packed=True)
    store = ArrayStore(root.study(study.study.name).absolute())
    store.write(array)
    return Pilot(store.folder / "ssmscale-packed.json", array, ())


def states(pilot: Pilot) -> set[str | None]:
    return {read_progress(folder).state for folder in pilot.start.run_dirs}


def test_a_job_whose_time_is_over_is_requeued_as_long_as_it_makes_progress(
    pilot: Pilot, scontrol: Path
) -> None:
    pilot.told = ["SIGUSR2"]
    assert [pilot.settle(EXIT_PREEMPTED, "elsewhere") for _ in range(4)] == [EXIT_PREEMPTED] * 4
    assert scontrol.read_text().split() == ["7_0"] * 4
    assert states(pilot) == {None}


def test_a_job_whose_time_ends_without_progress_is_started_three_times(pilot: Pilot, scontrol: Path) -> None:
    pilot.told = ["SIGUSR2"]
    codes = [pilot.settle(EXIT_PREEMPTED, pilot.start.place()) for _ in range(3)]
    assert codes == [EXIT_PREEMPTED, EXIT_PREEMPTED, 1]
    assert scontrol.read_text().split() == ["7_0", "7_0"]
    results = [read_progress(folder).result or {} for folder in pilot.start.run_dirs]
    (reason,) = {result["reason"] for result in results}
    assert "its job 7_0 stopped 3 times at the same place: its time limit was reached" in reason


@pytest.mark.parametrize(
    "more", ["PreemptTime=2026-01-01T00:00:00", "JobState=COMPLETING", "Restarts=1"], ids=str.lower
)
def test_a_job_that_slurm_ends_or_starts_again_by_itself_is_left_to_slurm(
    pilot: Pilot, scontrol: Path, tmp_path: Path, more: str
) -> None:
    (tmp_path / "more").write_text(more)
    pilot.told = ["SIGTERM"]
    assert [pilot.settle(EXIT_PREEMPTED, pilot.start.place()) for _ in range(4)] == [EXIT_PREEMPTED] * 4
    assert not scontrol.exists()
    assert states(pilot) == {None}


@dataclass
class OfControllers(Pilot):
    """A job without a Ray, whose controllers are functions that return their exit status."""

    controllers: list[Callable[[], int]] = field(default_factory=list)

    def _ray(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def _train(self, nodes: object) -> int:
        return self.controllers.pop(0)()


def test_a_run_that_is_retried_while_its_job_is_about_to_end_is_trained_by_that_job(pilot: Pilot) -> None:
    def fail() -> int:
        for folder in pilot.start.run_dirs:
            with begin_run(pilot.start.root, read_run(folder)) as journal:
                journal.append(Event.FAILED, reason="its loss is not a number", kind="diverged")
        names = [
            folder.name for folder in pilot.start.run_dirs
        ]  # Ray is ending, and the controller has ended
        pilot.control.append("retried", runs=names, attempts=dict.fromkeys(names, 1))
        return 0

    def finish_all() -> int:
        for folder in pilot.start.run_dirs:
            finish(begin_run(pilot.start.root, read_run(folder)), read_run(folder))
        return 0

    job = OfControllers(pilot.array_file, pilot.array, (), controllers=[fail, finish_all])
    assert job.run() == 0
    assert states(pilot) == {Event.FINISHED}


def test_a_job_whose_runs_other_processes_train_ends(pilot: Pilot) -> None:
    job = OfControllers(pilot.array_file, pilot.array, (), controllers=[lambda: 0])
    assert job.run() == EXIT_PREEMPTED


def test_a_job_ends_as_its_runs_did(pilot: Pilot, scontrol: Path) -> None:
    assert pilot.settle(EXIT_NO_SPACE, pilot.start.place()) == EXIT_NO_SPACE
    assert pilot.settle(0, pilot.start.place()) == EXIT_PREEMPTED  # others train what is left
    first, *others = (read_run(folder) for folder in pilot.start.run_dirs)
    for run in others:
        finish(begin_run(pilot.start.root, run), run)
    with begin_run(pilot.start.root, first) as journal:
        journal.append(Event.FAILED, reason="its loss is not a number", kind="diverged")
    assert pilot.settle(0, pilot.start.place()) == 1
    finish(begin_run(pilot.start.root, first), first)
    assert pilot.settle(0, pilot.start.place()) == 0
    assert not scontrol.exists()


def test_a_series_that_another_process_trains_is_not_given_up_with_the_others(
    pilot: Pilot, scontrol: Path
) -> None:
    theirs = pilot.array.tasks[0]
    pilot.told = ["SIGUSR2"]
    with untrained(pilot.start.root.series(theirs.series_id)):
        codes = [pilot.settle(EXIT_PREEMPTED, pilot.start.place()) for _ in range(3)]
    assert codes == [EXIT_PREEMPTED, EXIT_PREEMPTED, 1]
    given_up = [folder for folder in pilot.start.run_dirs if read_progress(folder).state == Event.FAILED]
    assert given_up == [folder for task in pilot.array.tasks[1:] for folder in task.run_dirs]


def test_the_pilot_waits_for_slurmctld_before_it_starts_ray(
    pilot: Pilot, scontrol: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n1")
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    (tmp_path / "bin" / "scontrol").write_text(
        f'#!/bin/sh\nmkdir "{tmp_path}/asked" && exit 1\necho "NodeName=n1 Arch=x86_64 NodeAddr=10.0.0.1"\n'
    )
    assert pilot._plan().nodes == {"n1": "10.0.0.1"}


@pytest.fixture
def agents(pilot: Pilot) -> Iterator[Callable[..., RayNodes]]:
    """Make a Ray of two nodes whose agents report these events, and run until they are told to end."""
    made: list[RayNodes] = []

    def agents(*more: NodeEvent) -> RayNodes:
        events = [
            NodeEvent(node="n1", event="head", address="127.0.0.1:1", temp_dir=pilot.folder),
            *(NodeEvent(node=name, event="up") for name in ("n1", "n2")),
        ]
        said = [
            "".join(event.model_dump_json(exclude_none=True) + "\n" for event in part)
            for part in (events, more)
        ]
        say = ["sh", "-c", 'printf %s "$1"; read join; printf %s "$2"; exec cat', "sh", *said]
        plan = NodePlan(
            token_file=pilot.folder / "token",
            log_dir=pilot.folder,
            nodes={"n1": "127.0.0.1", "n2": "127.0.0.1"},
            cpus=1,
            gpus=0,
        )
        made.append(RayNodes(say, plan, os.environ, pilot.told))
        made[-1].wait_until_ready()
        return made[-1]

    yield agents
    for nodes in made:
        if nodes.is_alive:
            nodes.end()


def test_a_controller_that_dies_with_rays_head_does_not_count_as_a_crash_of_the_runs(
    pilot: Pilot, agents: Callable[..., RayNodes]
) -> None:
    pilot.controller = ("-c", "raise SystemExit(1)")
    with pytest.raises(RayDown, match=r"^Ray ended: its head ended$"):
        pilot._train(agents(NodeEvent(node="n1", event="failed", reason="its head ended")))
    assert pilot.control.read() == []
    assert states(pilot) == {None}


def test_a_signal_that_comes_while_a_ray_ends_is_remembered(
    pilot: Pilot, agents: Callable[..., RayNodes]
) -> None:
    nodes = agents(NodeEvent(node="n1", event="signal", reason="SIGUSR2"))
    nodes.end()
    assert pilot.told == ["SIGUSR2"]


def test_ray_continues_without_a_node_that_is_not_its_head(agents: Callable[..., RayNodes]) -> None:
    nodes = agents(NodeEvent(node="n2", event="failed", reason="ended 3 times in a row"))
    heard: list[str] = []
    wait_until(lambda: heard.extend(event.event for event in nodes.listen(0.1)) or "failed" in heard)
    nodes.check()


def test_a_controller_that_does_not_end_on_a_signal_is_killed_in_time(
    pilot: Pilot, agents: Callable[..., RayNodes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pilot_module, "END_SECONDS", 0.0)
    pilot.controller = ("-c", "import time; time.sleep(60)")
    nodes = agents()
    pilot.told = ["SIGUSR2"]
    before = signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # which the controller inherits
    try:
        assert pilot._run_controller(nodes) == -signal.SIGKILL
    finally:
        signal.signal(signal.SIGUSR2, before)


@pytest.fixture
def handlers() -> Iterator[None]:
    """Restore the signal handlers after the test."""
    held = {number: signal.getsignal(number) for number in (*STOP_SIGNALS, signal.SIGCONT)}
    yield
    for number, handler in held.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
def test_a_job_whose_time_ends_while_ray_is_being_restarted_starts_none_and_is_requeued(
    pilot: Pilot, scontrol: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[None] = []

    @contextmanager
    def goes_away(_: Pilot) -> Iterator[None]:
        starts.append(None)
        raise RayDown("Ray ended: its head ended")
        yield

    append: Callable[..., None] = Control.append

    def tell_when_it_crashed(self: Control, event: str, **fields: Any) -> None:
        append(self, event, **fields)
        if len(starts) == 1:
            os.kill(os.getpid(), signal.SIGUSR2)  # the job has no step that SLURM could signal

    monkeypatch.setattr(Pilot, "_ray", goes_away)
    monkeypatch.setattr(Control, "append", tell_when_it_crashed)
    assert pilot_module.main([str(pilot.array_file)]) == EXIT_PREEMPTED
    assert len(starts) == 1
    assert scontrol.read_text().split() == ["7_0"]


@pytest.mark.usefixtures("handlers")
def test_a_ray_without_nodes_is_restarted_and_not_only_its_controller(
    pilot: Pilot, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Nodes:
        """Agents that have noticed nothing: a raylet hangs."""

        def listen(self, _: float) -> None: ...

        def check(self) -> None: ...

    starts: list[None] = []

    @contextmanager
    def started(pilot: Pilot) -> Iterator[Nodes]:
        starts.append(None)
        pilot.log.parent.mkdir(parents=True, exist_ok=True)
        pilot.log.write_text("Ray has had no node for 360 s\n")
        yield Nodes()

    monkeypatch.setattr(Pilot, "_ray", started)
    codes = iter([EXIT_NO_NODES, EXIT_PREEMPTED])
    monkeypatch.setattr(Pilot, "_run_controller", lambda self, nodes: next(codes))
    assert pilot_module.main([str(pilot.array_file)]) == EXIT_PREEMPTED
    assert len(starts) == 2
    (crash,) = pilot.control.read()
    assert crash["reason"] == "Ray has had no node for 360 s"
